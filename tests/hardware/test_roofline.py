import json
import math

import pytest

from tersor.core.measurement import Measurement
from tersor.hardware import roofline as module
from tersor.hardware.profile import read_profile
from tersor.hardware.roofline import Roofline, counsel, layer_times, roofline_of, this_roofline
from tersor.hardware.roofline_worker import measure
from tersor.hardware.this import this_profile
from tersor.measure.workload import Operation, Workload


def told(value):
    return Measurement(value, "per second")


MACHINE = Roofline(
    "made up",
    {"fp32": told(100.0), "int8": told(400.0)},
    ((1000.0, told(50.0)), (math.inf, told(10.0))),
)


def one_layer(macs, weights, values=(10, 10), compute="float", bits=32.0):
    """A layer that reads x and writes y."""
    operation = Operation("layer", "linear", macs, {"w": weights}, ("x",), ("y",), compute=compute)
    sizes = {"x": values[0], "y": values[1]}
    widths = dict.fromkeys(("x", "y", "w"), bits)
    return Workload("one", 1, (operation,), sizes, {"w": weights}, widths, ("x",), ("y",))


def test_a_layer_takes_as_long_as_its_operations_or_its_bytes():
    (time,) = layer_times(one_layer(macs=500, weights=1000), MACHINE)
    assert time.cost.bytes == 4 * (1000 + 20)
    assert time.compute_seconds == 2 * 500 / 100 and time.memory_seconds == 4080 / 10
    assert time.seconds == 408 and time.bound == "memory" and time.ridge == 10


def test_the_bound_changes_where_intensity_passes_the_ridge():
    for macs, bound in ((20399, "memory"), (20401, "compute")):
        (time,) = layer_times(one_layer(macs=macs, weights=1000), MACHINE)
        assert (time.cost.intensity > time.ridge) == (bound == "compute") and time.bound == bound


def test_what_fits_in_near_memory_is_read_from_there():
    (near,), (far,) = (layer_times(one_layer(macs=0, weights=n, values=(5, 5)), MACHINE) for n in (240, 241))
    assert near.memory_seconds == 1000 / 50 and far.memory_seconds == 1004 / 10


def test_integers_run_at_their_own_peak_and_what_a_device_lacks_is_none():
    (time,) = layer_times(one_layer(10**6, 10, compute="int8", bits=8.0), MACHINE)
    assert time.precision == "int8" and time.compute_seconds == 2e6 / 400
    assert layer_times(one_layer(10, 10), roofline_of(read_profile("edge-tpu"))) is None
    assert layer_times(one_layer(10, 10, compute="int8"), Roofline("f", {"fp32": told(1)}, MACHINE.bandwidths)) is None


def test_half_precision_runs_in_float32_where_there_is_no_half_type():
    assert MACHINE.peak("float", 16) == ("fp32", told(100.0))
    assert roofline_of(read_profile("server-cpu-amx")).peak("float", 16)[0] == "bf16"
    assert roofline_of(read_profile("server-cpu-amx")).peak("float", 32)[0] == "fp32"


def test_each_place_under_the_roofline_has_its_own_counsel():
    def said(workload, share=0.5):
        return counsel(layer_times(workload, MACHINE)[0], share, 4.0)

    assert said(one_layer(10**6, 10)).startswith("int8 (peak 4.0×), fewer channels")
    assert said(one_layer(10**6, 10, compute="int8")).startswith("fewer channels")
    assert said(one_layer(1, 10**4)).startswith("smaller weights")
    assert said(one_layer(1, 10, values=(10**4, 10**4))).startswith("smaller activations")
    assert said(one_layer(1, 10**4), share=0.001).startswith("neither")


def test_the_worker_times_what_the_product_runs():
    ticks = []
    found = measure({"threads": 1, "side": 64, "reads": [2**16, 2**18], "seconds": 0.01}, lambda: ticks.append(1))
    assert set(found["peaks"]) == {"fp32", "bf16", "int8"} and len(ticks) == 5
    assert all(entry["operations"] == 2 * 64**3 and min(entry["seconds"]) > 0 for entry in found["peaks"].values())
    assert [entry["bytes"] for entry in found["bandwidths"]] == [2**16, 2**18]
    assert all(len(entry["seconds"]) >= 9 for entry in found["bandwidths"])


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measuring process; counts how often it was asked."""
    calls = []

    def fresh(module_name, request, **more):
        calls.append(request)
        peaks = {
            name: {"operations": 1000, "seconds": [0.5, 1.0, 2.0], "through": "t"} for name in ("fp32", "bf16", "int8")
        }
        return {
            "peaks": peaks,
            "bandwidths": [{"bytes": 10, "seconds": [1.0, 2.0, 3.0]}, {"bytes": 100, "seconds": [20.0]}],
        }

    monkeypatch.setattr(module, "run_fresh", fresh)
    return calls


def test_this_machine_is_measured_once_and_kept_by_threads(measured, tmp_path):
    first = this_roofline(threads=1, folder=tmp_path)
    assert this_roofline(threads=1, folder=tmp_path) == first and len(measured) == 1
    this_roofline(threads=2, folder=tmp_path)
    this_roofline(threads=1, folder=tmp_path, again=True)
    assert [request["threads"] for request in measured] == [1, 2, 1]
    assert Roofline.from_json(json.loads(json.dumps(first.to_json()))) == first


def test_a_peak_is_the_best_of_its_timings_and_its_median_the_lower_end(measured, tmp_path):
    found = this_roofline(threads=1, folder=tmp_path)
    assert (found.peaks["fp32"].value, found.peaks["fp32"].low, found.peaks["fp32"].high) == (2000, 1000, None)
    assert found.bandwidth(10).value == 10 and found.bandwidth(11).value == 5 and found.bandwidth(1e12).value == 5


def test_a_kept_roofline_that_is_damaged_is_measured_again(measured, tmp_path):
    this_roofline(threads=1, folder=tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text("{")
    this_roofline(threads=1, folder=tmp_path)
    assert len(measured) == 2 and json.loads(kept.read_text())


def test_this_machine_is_a_profile_like_the_others(measured, tmp_path):
    found = this_profile(this_roofline(threads=1, folder=tmp_path))
    assert found.compute["int8"].basis == "measured" and "through t" in found.compute["int8"].source
    assert any("hardly faster" in caution.what for caution in found.cautions)  # the peaks above are all the same
