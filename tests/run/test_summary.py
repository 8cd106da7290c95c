import dataclasses

import pytest
from torch import nn

from tersor.core.measurement import Measurement
from tersor.core.metric import ACCURACY, MEAN_SQUARED_ERROR
from tersor.core.record import Record
from tersor.core.task import Task
from tersor.report.schema import parse_summary
from tersor.run.budgets import Budgets
from tersor.run.summary import summarise

FACTS = {
    "recipe": {"name": "mine", "explanation": "", "steps": []},
    "notes": ["a note"],
    "environment": {"tersor": "0.1.0", "threads": "1"},
    "command": "tersor compress mine.py -o run",
    "seed": 0,
    "base_sha256": "0" * 64,
}


UNIT = {ACCURACY: "percentage points", MEAN_SQUARED_ERROR: MEAN_SQUARED_ERROR.unit}


def _record(number, *, value, drop, speed=(2.0, 1.9, 2.1), metric=ACCURACY):
    measurements = {
        metric.name: Measurement(value, metric.unit, value - 0.01, value + 0.01, 200),
        f"validation_{metric.name}": Measurement(value, metric.unit, value - 0.01, value + 0.01, 100),
        "drop_points": Measurement(
            drop, "percentage points" if metric is ACCURACY else metric.unit, drop - 1, drop + 1, 200
        ),
        "size_bytes": Measurement(1000.0 / (number + 1), "bytes"),
        "parameters": Measurement(100.0 / (number + 1), "parameters"),
        "macs": Measurement(100.0 / (number + 1), "MACs"),
        "latency_ms_batch_1": Measurement(1.0, "ms", 0.9, 1.1, 9),
        "speedup_batch_1": Measurement(speed[0], "×", speed[1], speed[2], 9),
        "speedup_batch_32": Measurement(speed[0], "×", speed[1], speed[2], 9),
    }
    return Record(number, ["baseline", "prune", "quantize"][number], "a step", {}, measurements, 0, 1.5)


def _summary(records, budgets=Budgets(), metric=ACCURACY, shipped=None):
    task = Task(nn.Linear(1, 1), metric=metric, name="mine")
    return summarise(task, FACTS, records, shipped or records[-1], budgets)


RECORDS = [_record(0, value=0.90, drop=0.0), _record(1, value=0.88, drop=2.0), _record(2, value=0.89, drop=1.0)]


def test_what_is_written_fits_the_published_schema():
    summary = _summary(RECORDS, Budgets(max_drop=2))
    assert parse_summary(summary).to_json()["ratios"]["size"] == 3.0
    assert summary["seconds"] == 4.5 and summary["task"]["notes"] == ["a note"]
    assert set(summary["ratios"]) >= {"size", "latency_batch_1", "latency_batch_32", "accuracy_drop_points"}


def test_the_sentence_says_lower_where_accuracy_fell_and_higher_where_it_rose():
    assert "1.00 points lower than the original's" in _summary(RECORDS)["verdict"]["sentence"]
    better = [RECORDS[0], _record(1, value=0.91, drop=-1.0)]
    assert "1.00 points higher than the original's" in _summary(better)["verdict"]["sentence"]


def test_the_sentence_has_the_interval_of_the_change_in_the_direction_of_the_change():
    records = [RECORDS[0], _record(1, value=0.88, drop=0.4)]
    assert "0.40 points lower than the original's (−0.60 to 1.40)" in _summary(records)["verdict"]["sentence"]
    records = [RECORDS[0], _record(1, value=0.91, drop=-1.5)]
    assert "1.50 points higher than the original's (0.50 to 2.50)" in _summary(records)["verdict"]["sentence"]


def test_the_sentence_turns_around_for_an_error_that_should_be_small():
    metric = MEAN_SQUARED_ERROR
    records = [_record(0, value=2.0, drop=0.0, metric=metric), _record(1, value=2.4, drop=0.4, metric=metric)]
    assert "0.40 squared units higher than the original's" in _summary(records, metric=metric)["verdict"]["sentence"]


@pytest.mark.parametrize(
    ("speed", "words"),
    [
        ((2.0, 1.9, 2.1), "2.0× faster at batch 1 (1.9–2.1)"),
        ((0.97, 0.85, 0.98), "1.03× slower at batch 1 (1.02–1.18)"),
        ((0.5, 0.45, 0.6), "2.0× slower at batch 1 (1.7–2.2)"),
        ((58.4, 6.3, 64.0), "6.3× to 64.0× the speed at batch 1 (the machine was too noisy to say closer)"),
        ((1.1, 0.9, 1.3), "no faster at batch 1 (no difference shown)"),
    ],
)
def test_a_speed_is_claimed_only_where_its_interval_shows_one(speed, words):
    records = [RECORDS[0], _record(1, value=0.9, drop=0.0, speed=speed)]
    summary = _summary(records)
    assert words in summary["verdict"]["sentence"]
    assert any("slower" in note for note in summary["steps"][0]["notes"]) == (speed[2] < 1)


def test_a_missed_budget_is_in_status_and_sentence():
    summary = _summary(RECORDS, Budgets(max_drop=0.5))
    assert summary["verdict"]["status"] == "missed"
    assert "max_drop is 1 points, allowed 0.5" in summary["verdict"]["sentence"]


def test_that_no_step_keeps_the_budget_is_said():
    sentence = _summary(RECORDS, Budgets(max_drop=0.5))["verdict"]["sentence"]
    assert "No step keeps max_drop on validation; 'quantize' lost least there" in sentence


def test_an_earlier_step_that_ships_is_said():
    summary = _summary(RECORDS, Budgets(max_drop=9), shipped=RECORDS[1])
    assert summary["final"]["name"] == "prune" and "'prune' is shipped instead" in summary["verdict"]["sentence"]


def test_numbers_come_from_the_machine_that_measured_them():
    facts = dataclasses.replace(RECORDS[0], versions={"torch": "0"})
    assert _summary([facts, *RECORDS[1:]])["environment"] == FACTS["environment"]
