import math

import pytest
import torch

from tersor.core.errors import InputError
from tersor.train.schedules import Constant, Cosine, OneCycle


def test_cosine_rises_in_equal_steps_then_falls_along_the_cosine():
    factors = [Cosine(warmup=0.2).factor(step, 10) for step in range(10)]
    assert factors[:3] == pytest.approx([0.5, 1.0, 1.0])
    for step in range(2, 10):
        assert factors[step] == pytest.approx((1 + math.cos(math.pi * (step - 2) / 8)) / 2)


def test_cosine_without_warmup_starts_at_the_full_rate_and_ends_at_its_floor():
    assert Cosine(warmup=0, floor=0.1).factor(0, 100) == 1.0
    assert Cosine(warmup=0, floor=0.1).factor(99, 100) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize("steps", [10, 40, 99])
def test_one_cycle_is_torch_s(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=steps, cycle_momentum=False)
    for step in range(steps):
        assert OneCycle().factor(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-5, abs=1e-9)
        optimizer.step()
        if step < steps - 1:
            reference.step()


@pytest.mark.parametrize(
    "schedule", [Constant(), Cosine(), OneCycle(), Cosine(warmup=1.0), OneCycle(rise=1.0), OneCycle(rise=0)]
)
@pytest.mark.parametrize("steps", [1, 2, 3, 17])
def test_factors_are_fractions_for_any_number_of_steps(schedule, steps):
    assert all(0 <= schedule.factor(step, steps) <= 1 for step in range(steps))


def test_a_warmup_that_is_no_fraction_is_an_error():
    with pytest.raises(InputError, match="Cosine.warmup: not a fraction. Got 5"):
        Cosine(warmup=5)
