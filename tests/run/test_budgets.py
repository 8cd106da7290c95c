import pytest

from tersor.core.errors import InputError
from tersor.core.measurement import Measurement
from tersor.core.metric import ACCURACY, MEAN_SQUARED_ERROR
from tersor.core.record import Record
from tersor.run.budgets import Budgets, choose, merge, validation_drop


def _record(number, validation, *, size=100.0, test_drop=0.0, metric=ACCURACY):
    measurements = {
        f"validation_{metric.name}": Measurement(validation, metric.unit),
        "drop_points": Measurement(test_drop, "percentage points", test_drop - 1, test_drop + 1, 100),
        "size_bytes": Measurement(size, "bytes"),
        "latency_ms_batch_1": Measurement(1.0, "ms"),
    }
    return Record(number, f"step{number}", "a step", {}, measurements, 0, 1.0)


RECORDS = [_record(0, 0.90), _record(1, 0.89), _record(2, 0.88), _record(3, 0.70)]


def test_without_a_budget_the_last_step_ships():
    assert choose(RECORDS, Budgets(), ACCURACY).number == 3


def test_the_last_step_that_keeps_the_budget_on_validation_ships():
    assert choose(RECORDS, Budgets(max_drop=2), ACCURACY).number == 2
    assert choose(RECORDS, Budgets(max_drop=1), ACCURACY).number == 1


def test_where_no_step_keeps_it_the_one_that_lost_least_ships():
    records = [_record(0, 0.90), _record(1, 0.50), _record(2, 0.60), _record(3, 0.55)]
    assert choose(records, Budgets(max_drop=1), ACCURACY).number == 2


def test_the_test_data_takes_no_part_in_the_choice():
    records = [_record(0, 0.90), _record(1, 0.89, test_drop=0.0), _record(2, 0.90, test_drop=50.0)]
    assert choose(records, Budgets(max_drop=1), ACCURACY).number == 2


def test_a_size_budget_prefers_a_step_that_keeps_it():
    records = [_record(0, 0.90), _record(1, 0.90, size=10.0), _record(2, 0.90, size=90.0)]
    assert choose(records, Budgets(max_size=50), ACCURACY).number == 1
    assert choose(records, Budgets(max_size=5), ACCURACY).number == 2


def test_lower_is_better_turns_the_drop_around():
    metric = MEAN_SQUARED_ERROR
    records = [_record(0, 2.0, metric=metric), _record(1, 2.5, metric=metric), _record(2, 9.0, metric=metric)]
    assert validation_drop(records[0], records[1], metric) == pytest.approx(0.5)
    assert choose(records, Budgets(max_drop=1), metric).number == 1


def test_a_recipes_points_do_not_bind_a_metric_that_is_no_fraction():
    merged, notes = merge(Budgets(max_size=10), Budgets(max_drop=2), MEAN_SQUARED_ERROR)
    assert merged == Budgets(None, 10) and "mean_squared_error" in notes[0]
    assert merge(Budgets(max_drop=0.5), Budgets(max_drop=2), MEAN_SQUARED_ERROR) == (Budgets(0.5), [])
    assert merge(Budgets(), Budgets(max_drop=2), ACCURACY) == (Budgets(2), [])


def test_lines_say_limit_value_interval_and_whether_it_is_met():
    (line,) = Budgets(max_drop=2).check(_record(1, 0.9, test_drop=2.5))
    assert line == {
        "name": "max_drop",
        "limit": 2,
        "unit": "points",
        "value": 2.5,
        "low": 1.5,
        "high": 3.5,
        "met": False,
    }


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_a_budget_that_is_no_limit_is_refused(value):
    with pytest.raises(InputError, match="max_drop"):
        Budgets(max_drop=value)
