"""Numbers as people read them."""

import pytest

from tersor.core.measurement import Measurement
from tersor.report.format import both_of, count, duration, human, interval_of, shorten, tight, value_of


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.983, "fraction", "98.3 %"),
        (1.0, "fraction", "100.0 %"),
        (1_940_000, "bytes", "1.94 MB"),
        (67_000, "bytes", "67.0 kB"),
        (999, "bytes", "999 B"),
        (512_000, "parameters", "0.51 M"),
        (148_000, "parameters", "148 k"),
        (12_345_678, "MACs", "12.3 M"),
        (4.1e9, "MACs", "4.10 G"),
        (650, "count", "650"),
        (2.3, "×", "2.3×"),
        (1.04, "×", "1.04×"),
        (0.412, "ms", "0.412 ms"),
        (12.34, "ms", "12.3 ms"),
        (0.0456, "ms", "0.0456 ms"),
        (-0.3, "percentage points", "−0.3 points"),
        (0.04, "points", "0.04 points"),
        (-0.0, "points", "0.0 points"),
        (27_100, "samples/s", "27100 samples/s"),
        (0.0123, "squared units", "0.0123 squared units"),
        (0, "bytes", "0 B"),
    ],
)
def test_a_value_is_written_with_its_unit(value, unit, text):
    assert value_of(Measurement(value, unit)) == text


def test_an_interval_has_the_scale_of_its_value():
    assert both_of(Measurement(0.983, "fraction", 0.971, 0.99)) == "98.3 % [97.1, 99.0]"
    assert both_of(Measurement(2.3, "×", 2.1, 2.5)) == "2.3× [2.1, 2.5]"
    assert both_of(Measurement(1_200_000, "bytes", 900_000, 1_500_000)) == "1.20 MB [0.90, 1.50]"


def test_a_small_negative_number_that_rounds_to_zero_has_no_sign():
    assert interval_of(Measurement(0.3, "points", -0.04, 0.6)) == "[0.0, 0.6]"


def test_what_is_missing_is_a_dash_and_no_interval():
    assert value_of(None) == "–" and interval_of(None) == "" and interval_of(Measurement(1.0, "ms", 0.5)) == ""


def test_durations_grow_by_minutes_and_hours():
    told = [duration(seconds) for seconds in (0.42, 42.3, 59.7, 185, 7470)]
    assert told == ["0.4 s", "42 s", "1 min 0 s", "3 min 5 s", "2 h 4 min"]


def test_field_names_become_labels():
    assert human("latency_ms_batch_1_p95") == "latency, batch 1, p95"
    assert (
        human("size_bytes") == "file size"
        and human("speedup_batch_32") == "speed-up, batch 32"
        and human("drop_points") == "drop"
        and human("accuracy") == "accuracy"
    )


def test_long_names_keep_the_end_that_tells_them_apart():
    assert shorten("blocks.10.attention.query", 12, keep_end=True) == "…ntion.query"
    assert shorten("a step\nwith\x00control", 40) == "a step with control"
    assert shorten("abcdef", 4) == "abc…"


def test_counts_below_a_thousand_are_whole():
    assert count(999) == "999" and count(9216) == "9.22 k"


def test_numbers_and_units_do_not_part_at_a_line_end():
    assert tight("accuracy 98.6 %, 0.30 points lower") == "accuracy 98.6\u00a0%, 0.30\u00a0points lower"
    assert tight("3 steps") == "3 steps"
