from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.hardware.fits import fits_on, largest_keep
from tersor.hardware.profile import read_profile, to_yaml
from tersor.measure.kv_cache import KeyValueCache
from tersor.measure.workload import Operation, Workload

import yaml  # isort: skip


def device(name="phone", **figures):
    """A shipped profile with other values of some figures."""
    data = yaml.safe_load(to_yaml(read_profile(name)))
    for key, value in figures.items():
        data[key]["value"] = value
    return read_profile(data)


def model(weights=1000, values=100, macs=1000, operator="linear"):
    """A layer that reads and writes so many values."""
    operation = Operation("layer", operator, macs, {"w": weights}, ("x",), ("y",))
    return Workload("one", 1, (operation,), {"x": values, "y": values}, {"w": weights}, {}, ("x",), ("y",))


def test_a_model_fits_up_to_the_last_byte():
    needed = 4 * (1000 + 200)
    for memory, fits in ((needed, True), (needed - 1, False)):
        row = fits_on(model(), device(memory=memory)).fits[0]
        assert row.fits is fits and row.needed.value == needed and row.available == memory


def test_weights_of_a_microcontroller_lie_in_its_storage():
    small = model(weights=100_000, values=1000)  # 400 kB and 8 kB
    row = fits_on(small, device("microcontroller")).fits[0]
    assert row.fits and row.needed.value == 8000
    row = fits_on(model(weights=300_000, values=1000), device("microcontroller")).fits[0]
    assert row.fits is False and "1.2× its storage" in row.reason
    row = fits_on(model(weights=10, values=50_000), device("microcontroller")).fits[0]
    assert row.fits is False and "1.2× its memory" in row.reason


def test_rows_are_the_numbers_that_the_device_knows_each_smaller_than_the_last():
    rows = fits_on(model(), device()).fits
    assert [row.numbers for row in rows] == ["as it is", "fp16", "int8", "int4 weights"]
    weights = [row.weights.value for row in rows]
    assert weights[:3] == [4000, 2000, 1000] and weights[3] == 1000 * 4.25 / 8
    assert [row.numbers for row in fits_on(model(), device("microcontroller")).fits] == ["as it is", "int8"]


def test_latency_is_called_an_estimate_and_said_to_be_a_bound():
    row = fits_on(model(macs=207 * 10**9), device()).fits[0]
    assert row.latency.value == pytest.approx(2000) and row.latency.unit == "ms"
    assert "no faster than" in row.latency.conditions["estimate"] and row.memory_bound == 0


def test_an_edge_tpu_runs_integers_alone_and_floats_are_no_failure_of_memory():
    found = fits_on(model(), device("edge-tpu"))
    floats, integers = found.fits
    assert floats.fits is None and floats.latency is None and "int8 only" in floats.reason
    assert integers.fits and integers.near and [way.numbers for way in found.ways] == ["int8"]
    large = fits_on(model(weights=9 * 10**6), device("edge-tpu"))
    assert large.fits[1].near is False and any("8 MB" in caution for caution in large.cautions)


def test_a_decoders_cache_counts_as_memory_and_slows_each_token():
    cache = KeyValueCache(layers=2, heads=4, width=8, context=100)
    with_cache = fits_on(model(), device(), cache=cache).fits[0]
    assert with_cache.cache.value == 4 * 2 * 2 * 4 * 8 * 100
    assert with_cache.needed.value == 4800 + with_cache.cache.value
    read = 4000 + with_cache.cache.value
    assert with_cache.token_latency.value == pytest.approx(1e3 * read / 51.2e9)


def test_what_would_make_it_fit_is_said_for_each_kind_of_numbers_and_does():
    found = fits_on(model(weights=10**6, values=1000), device(memory=10**6))
    ways = {way.numbers: way for way in found.ways}
    assert found.fits[0].fits is False and ways["int4 weights"].keep_channels == 1
    way = ways["as it is"]
    assert way.weight_sparsity == pytest.approx(1 - way.keep_channels**2)
    assert 4 * (10**6 * way.keep_channels**2 + 2000 * way.keep_channels) <= 10**6 * (1 + 1e-9)
    assert not fits_on(model(), device()).ways
    assert not fits_on(model(weights=10**9), device(memory=1000)).ways


@given(st.floats(1, 1e9), st.floats(0, 1e9), st.floats(1, 1e9))
def test_the_largest_share_of_channels_fits_and_a_larger_one_does_not(weights, activations, memory):
    keep = largest_keep(weights, activations, memory)
    needed = [weights * k**2 + activations * k for k in (keep, 1.01 * keep)]
    assert 0 < keep <= 1 and needed[0] <= memory * (1 + 1e-6) + 1e-6 * weights
    assert keep == 1 or needed[1] > memory * (1 - 1e-6)


def test_failure_modes_are_said_where_they_apply():
    plain = fits_on(model(), device("phone")).cautions
    deep = fits_on(model(operator="depthwise conv2d"), device("phone")).cautions
    assert len(deep) == len(plain) + 1 and any("Depthwise" in what for what in deep)
    attention = fits_on(model(operator="scaled_dot_product_attention"), device("edge-tpu")).cautions
    assert any("transformers fall to the CPU" in what for what in attention)
    starved, busy = (fits_on(model(macs=macs), device("phone")).cautions for macs in (10, 10**9))
    assert len([what for what in starved if "shared with the screen" in what]) == 1
    assert not any("shared with the screen" in what for what in busy)


def test_layers_say_where_the_time_goes():
    (row,) = fits_on(model(weights=10**6, macs=10**6), device("phone")).layers
    assert row["share"] == 1 and row["bound"] == "memory" and row["advice"].startswith("smaller weights")
    assert row["intensity"] == 2 * 10**6 / (4 * (10**6 + 200))


def test_a_half_precision_model_keeps_a_half_precision_cache_and_is_not_offered_what_it_has():
    plain, counter = model(), {"w": 16.0, "x": 16.0, "y": 16.0, "count": 64.0}
    half = replace(plain, weights={**plain.weights, "count": 1}, bits=counter)
    cache = KeyValueCache(layers=1, heads=2, width=4, context=10)
    rows = {row.numbers: row for row in fits_on(half, device("gpu-t4"), cache=cache).fits}
    assert rows["as it is"].cache.value == cache.bytes(16) and "fp16" not in rows
    assert {"fp16", "int8"} < {row.numbers for row in fits_on(plain, device("gpu-t4"), cache=cache).fits}


def test_a_file_in_integers_is_offered_no_wider_numbers():
    plain = model()
    integers = replace(plain, weights={**plain.weights, "bias": 4}, bits={"w": 8.0, "x": 8.0, "y": 8.0})
    operations = (replace(plain.operations[0], compute="int8"),)
    rows = fits_on(replace(integers, operations=operations), device("gpu-t4")).fits
    assert [row.numbers for row in rows] == ["as it is"]
