import pytest

from tersor.hardware.advice import expectations, lines
from tersor.hardware.profile import read_profile
from tersor.hardware.roofline import roofline_of
from tersor.measure.workload import Operation, Workload


def model(weights, macs, values=1000):
    operation = Operation("layer", "linear", macs, {"w": weights}, ("x",), ("y",))
    return Workload("one", 1, (operation,), {"x": values, "y": values}, {"w": weights}, {}, ("x",), ("y",))


READS = model(weights=10**8, macs=10**8)  # a linear layer at batch 1
COMPUTES = model(weights=10**5, macs=10**11)


def advised(workload, name):
    profile = read_profile(name)
    roofline = roofline_of(profile)
    expected = expectations(workload, profile, roofline)
    return {line.topic: line for line in lines(workload, profile, roofline, expected)}, {e.name: e for e in expected}


def test_where_memory_decides_narrow_weights_come_first():
    said, expected = advised(READS, "server-cpu-vnni")
    assert said["first"].what == "quantise: int4 weights" and said["bound"].what.startswith("memory decides")
    assert expected["int4 weights"].speedup.value == pytest.approx(32 / 4.25, rel=0.01)
    assert expected["int8"].speedup.value == pytest.approx(4, rel=0.01)


def test_where_arithmetic_decides_integers_come_first():
    said, expected = advised(COMPUTES, "server-cpu-vnni")
    assert said["first"].what == "quantise: int8" and said["bound"].what.startswith("arithmetic decides")
    assert expected["int8"].speedup.value == pytest.approx(4, rel=0.01)
    assert expected["int4 weights"].speedup.value == pytest.approx(1, rel=0.01)  # its products stay float
    assert expected["half of the channels"].speedup.value == pytest.approx(4, rel=0.01)


def test_where_integers_are_hardly_faster_channels_come_first():
    said, _ = advised(COMPUTES, "server-cpu")
    assert said["first"].what == "prune: half of the channels"
    assert said["structure"].what == "whole channels, not single zeros"


def test_zeros_in_a_pattern_help_only_where_the_device_has_it_and_arithmetic_decides():
    said, expected = advised(COMPUTES, "gpu-a100")
    assert expected["2:4 zeros"].speedup.value == pytest.approx(2, rel=0.05)
    assert said["structure"].what == "2:4 zeros, or whole channels"
    said, expected = advised(READS, "gpu-a100")
    assert expected["2:4 zeros"].speedup.value == pytest.approx(1) and "wait for memory" in said["structure"].reason
    assert not any("zeros" in name for name in advised(COMPUTES, "phone")[1])


def test_what_does_not_fit_is_ranked_behind_what_does():
    said, expected = advised(model(weights=10**9, macs=10**9), "phone")  # 4 GB of 2
    fits = [each.fits for each in expected.values()]
    assert fits == sorted(fits, reverse=True) and False in [each.fits for each in expected.values()] + [False]
    assert "2.0× its memory" in said["first"].reason


def test_a_device_without_floats_is_told_so():
    said, _ = advised(COMPUTES, "edge-tpu")
    assert said["first"].what in {"quantise: int8", "prune: half of the channels"}
    assert "int8 only" in said["first"].reason and said["alignment"].what == "none needed"


def test_each_line_has_a_reason_and_what_it_rests_on():
    for name in ("phone", "microcontroller", "gpu-t4", "npu"):
        said, expected = advised(READS, name)
        assert {"first", "bits", "structure", "alignment", "expected gain", "bound"} == set(said)
        assert all(line.reason and line.basis in {"roofline", "profile"} for line in said.values())
        assert all("estimate" in e.speedup.conditions for e in expected.values() if e.speedup)
