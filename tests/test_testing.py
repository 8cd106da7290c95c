"""The conformance suite must catch what it is for."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _pop_mode
from torch.utils.data import DataLoader, TensorDataset

from tersor.core.edit import Cut, Mask, Slice, Write
from tersor.core.place import ByType, Selector, TensorPlace, select
from tersor.core.plan import Plan, Skip
from tersor.core.step import Method
from tersor.core.task import Task
from tersor.testing import check_method


@dataclass(frozen=True)
class MaskSmallest(Method):
    sparsity: float = 0.5
    where: Selector = ByType("Linear")

    def plan(self, model, task):
        edits = []
        for path, module in select(model, self.where).items():
            size = module.weight.detach().abs()
            keep = size > size.flatten().kthvalue(max(1, int(self.sparsity * size.numel()))).values
            edits.append(Mask(TensorPlace(path, "weight"), keep))
        return Plan("mask_smallest", tuple(edits))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


@pytest.fixture
def task(model):
    data = DataLoader(TensorDataset(torch.randn(10, 4), torch.arange(10) % 3), batch_size=5)
    return Task(model, data, data, data)


def test_a_good_method_passes_and_its_result_comes_back(model, task):
    result = check_method(MaskSmallest(), model, task)
    assert (result.model[0].weight == 0).float().mean() == 0.5


def test_a_dataclass_that_is_not_frozen_is_caught(model, task):
    @dataclass
    class Loose(MaskSmallest.__base__):
        def plan(self, model, task):
            return Plan("loose")

    with pytest.raises(AssertionError, match="not frozen"):
        check_method(Loose(), model, task)


def test_a_lambda_among_the_settings_is_caught(model, task):
    @dataclass(frozen=True)
    class WithLambda(Method):
        score: Callable = lambda weight: weight.abs()

        def plan(self, model, task):
            return Plan("lambda")

    with pytest.raises(AssertionError, match="'score' holds a function"):
        check_method(WithLambda(), model, task)


def scales_a_weight(model, task):
    model[0].weight.data *= 2


def turns_a_flag(model, task):
    model[1].eval()


def leaves_a_hook(model, task):
    model[0].register_forward_hook(lambda *_: None)


def leaves_a_gradient(model, task):
    task.loss_of(model, next(iter(task.train))).backward()


def runs_a_batch_norm_in_train_mode(model, task):
    model(*task.example_inputs)


def sets_an_attribute(model, task):
    model[0].out_features = 5


@pytest.mark.parametrize(
    "deed",
    [
        scales_a_weight, turns_a_flag, leaves_a_hook, leaves_a_gradient, runs_a_batch_norm_in_train_mode,
        sets_an_attribute,
    ],
    ids=lambda deed: deed.__name__,
)  # fmt: skip
def test_a_plan_that_writes_is_caught(model, task, deed):
    @dataclass(frozen=True)
    class Writer(Method):
        def plan(self, model, task):
            deed(model, task)
            return Plan("writer")

    with pytest.raises(AssertionError, match="plan changed the model it was given"):
        check_method(Writer(), model.train(), task)


def test_a_plan_that_draws_random_numbers_is_caught(model, task):
    @dataclass(frozen=True)
    class Gambler(Method):
        def plan(self, model, task):
            torch.rand(1)
            return Plan("gambler")

    with pytest.raises(AssertionError, match="disturbed the random state"):
        check_method(Gambler(), model, task)


def test_a_plan_that_differs_from_call_to_call_is_caught(model, task):
    calls = []

    @dataclass(frozen=True)
    class Moody(Method):
        def plan(self, model, task):
            calls.append(1)
            return Plan("moody", (Write(TensorPlace("0", "bias"), torch.full((6,), float(len(calls)))),))

    with pytest.raises(AssertionError, match="two plans of the same model differ"):
        check_method(Moody(), model, task)


def test_a_plan_that_depends_on_train_mode_is_caught(model, task):
    @dataclass(frozen=True)
    class Modal(Method):
        def plan(self, model, task):
            return Plan("modal", (), (Skip("0", f"training is {model.training}"),))

    with pytest.raises(AssertionError, match="train or eval mode"):
        check_method(Modal(), model, task)


@pytest.mark.parametrize("skip", [Skip("", "a fair reason"), Skip("0", "")], ids=["no place", "no reason"])
def test_a_skip_without_place_or_reason_is_caught(model, task, skip):
    @dataclass(frozen=True)
    class Silent(Method):
        def plan(self, model, task):
            return Plan("silent", (), (skip,))

    with pytest.raises(AssertionError, match="skip"):
        check_method(Silent(), model, task)


def test_a_summary_that_is_no_json_is_caught(model, task):
    @dataclass(frozen=True)
    class Odd(Method):
        def plan(self, model, task):
            return Plan("odd", (), (), (("0", torch.ones(1)),))

    with pytest.raises(AssertionError, match="no plain JSON"):
        check_method(Odd(), model, task)


def test_outputs_that_are_not_finite_are_caught(model, task):
    @dataclass(frozen=True)
    class Breaker(Method):
        def plan(self, model, task):
            return Plan("breaker", (Write(TensorPlace("3", "bias"), torch.full((3,), float("nan"))),))

    with pytest.raises(AssertionError, match="not finite"):
        check_method(Breaker(), model, task)


def test_a_wrong_slice_does_not_pass(model, task):
    @dataclass(frozen=True)
    class WrongIndex(Method):
        def plan(self, model, task):
            kept, other = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
            tensors = [("0", "weight"), ("0", "bias"), ("1", "weight"), ("1", "bias"), ("1", "running_mean")]
            tensors.append(("1", "running_var"))
            cuts = [Cut(TensorPlace(*place), 0, kept, "producer") for place in tensors]
            return Plan("wrong", (Slice((*cuts, Cut(TensorPlace("3", "weight"), 1, other, "consumer"))),))

    with pytest.raises(Exception, match="differs from the masked one"):
        check_method(WrongIndex(), model, task)


def test_an_edit_that_is_lost_on_the_way_through_json_is_caught(model, task, monkeypatch):
    import tersor.testing

    def forgetful(data, tensors):
        return Write(TensorPlace("3", "bias"), torch.zeros(3))

    monkeypatch.setattr(tersor.testing, "edit_from_json", forgetful)
    with pytest.raises(Exception, match=r"parametrizations|another model"):
        check_method(MaskSmallest(), model, task)


class Everywhere(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_mode_left_behind_is_caught(model, task):
    @dataclass(frozen=True)
    class Leaver(MaskSmallest):
        def plan(self, model, task):
            Everywhere().__enter__()
            return super().plan(model, task)

    with pytest.raises(AssertionError, match="plan left torch in another mode"):
        check_method(Leaver(), model, task)
    _pop_mode()
