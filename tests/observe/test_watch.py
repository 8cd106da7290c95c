import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.intercept import Intercept
from tersor.core.place import ActivationPlace
from tersor.core.task import Task
from tersor.observe.watch import SAMPLE_PER_BATCH, watch

RELU = ActivationPlace("1", "relu")


def model_and_batches(count=3, size=5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    batches = [(torch.randn(size, 4), torch.zeros(size, dtype=torch.long)) for _ in range(count)]
    return model, batches


def test_extremes_are_those_of_all_values_seen():
    model, batches = model_and_batches()
    seen = watch(model, [RELU, ActivationPlace("", "input")], Task(model, calibration=batches), batches=3)
    hidden = torch.cat([model[1](model[0](x)) for x, _ in batches])
    inputs = torch.cat([x for x, _ in batches])
    assert seen[RELU].high == pytest.approx(hidden.max().item()) and seen[RELU].low == 0
    assert seen[ActivationPlace("", "input")].low == pytest.approx(inputs.min().item())
    assert seen[RELU].calls == 3 and seen[RELU].shape == (5, 6)
    # few values: the sample holds them all, and both extremes once more
    expected = torch.cat([hidden.flatten(), hidden.min()[None], hidden.max()[None]]).sort().values
    assert torch.allclose(seen[RELU].sample.sort().values, expected)


def test_the_extremes_of_each_call_are_kept():
    model, batches = model_and_batches(2)
    seen = watch(model, [RELU], Task(model, calibration=batches), batches=2)[RELU]
    first, second = (model[1](model[0](x)).max().item() for x, _ in batches)
    assert seen.highs == pytest.approx([first, second]) and seen.lows == [0, 0] and seen.calls == 2


def test_only_as_many_batches_are_drawn_as_asked_for():
    model, batches = model_and_batches(5)
    drawn = []
    loader = (drawn.append(i) or batch for i, batch in enumerate(batches))
    assert watch(model, [RELU], Task(model, calibration=loader), batches=2)[RELU].calls == 2
    assert drawn == [0, 1]


def test_the_sample_is_bounded_and_the_same_each_time():
    model, batches = model_and_batches(2, size=4000)
    task = Task(model, calibration=batches)
    first, second = (watch(model, [RELU], task, batches=2)[RELU].sample for _ in range(2))
    assert len(first) == 2 * SAMPLE_PER_BATCH + 2
    assert torch.equal(first, second)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, batches = model_and_batches()
    model.train()
    batches[1][0][0, 0] = float("nan")
    state = torch.random.get_rng_state()
    with pytest.raises(InputError, match=r"1:relu\[0\].*not finite"):
        watch(model, [RELU], Task(model, calibration=batches), batches=3)
    assert model.training and not any(isinstance(m, Intercept) for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("loader", [None, []])
def test_missing_calibration_data_is_said(loader):
    model, _ = model_and_batches()
    with pytest.raises(InputError, match="calibration"):
        watch(model, [RELU], Task(model, calibration=loader), batches=1)
