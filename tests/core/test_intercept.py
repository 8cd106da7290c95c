import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import GraphError
from tersor.core.intercept import CHILD, Intercept, end_passes, intercept_at, operator_name
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.graph.trace import trace


class Add(nn.Module):
    """A tap that tells it was here."""

    def __init__(self, amount):
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(float(amount)))

    def forward(self, x):
        return x + self.amount


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.inner.weight)

    def forward(self, x):
        y = self.inner(x)
        y += x
        return F.relu(y) + x


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Residual()

    def forward(self, x):
        return self.block(self.block(x)) * 2


X = torch.tensor([[1.0, 2.0]])


@pytest.mark.parametrize(
    "spelling, name",
    [
        (torch.Tensor.__iadd__, "add"), (torch.Tensor.add_, "add"), (torch.Tensor.__radd__, "add"), (torch.add, "add"),
        (F.relu, "relu"), (torch.relu_, "relu"), (torch.Tensor.__rsub__, "sub"), (torch.Tensor.__matmul__, "matmul"),
        (torch.concat, "cat"), (torch.conv2d, "conv2d"), (F.relu6, "hardtanh"),
    ],
)  # fmt: skip
def test_every_spelling_of_an_operator_has_one_name(spelling, name):
    assert operator_name(spelling) == name


@pytest.mark.parametrize("ordinal, expected", [(0, [[13.0, 16.0]]), (1, [[13.0, 16.0]])])
def test_the_nth_result_of_an_operator_is_replaced(ordinal, expected):
    model = Residual()
    plain = model(X)
    intercept_at(model, "").add("add", ordinal, Add(10))
    assert model(X).tolist() == (plain + 10).tolist() == expected


def test_a_tap_on_relu_sees_what_relu_gives_however_it_is_spelt():
    for relu in (
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        lambda x: F.relu(x, inplace=True),
        lambda x: x.clone().relu_(),
    ):

        class Net(nn.Module):
            def forward(self, x):
                return relu(x * 1)  # noqa: B023

        model = Net()
        intercept_at(model, "").add("relu", 0, Add(5))
        assert model(torch.tensor([-1.0, 1.0])).tolist() == [5.0, 6.0]


def test_a_module_called_twice_has_two_ordinals_and_counting_restarts_with_each_forward():
    model = Twice()
    plain = model(X)
    intercept_at(model, "block").add("relu", 1, Add(1))
    for _ in range(3):
        assert torch.equal(model(X), plain + 2)


def test_counting_restarts_after_a_forward_that_raised():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.fail = Residual(), False

        def forward(self, x):
            y = self.block(x)
            if self.fail:
                raise RuntimeError("stop")
            return self.block(y)

    model = Sometimes()
    plain = model(X)
    intercept_at(model, "block").add("relu", 1, Add(1))
    model.fail = True
    with pytest.raises(RuntimeError, match="stop"):
        model(X)
    model.fail = False
    assert torch.equal(model(X), plain + 1)


def test_calls_of_children_are_not_the_parents():
    model = Twice()
    plain = model(X)
    intercept_at(model, "").add("add", 0, Add(100))
    assert torch.equal(model(X), plain)
    intercept_at(model, "").add("mul", 0, Add(100))
    assert torch.equal(model(X), plain + 100)


def test_taps_stand_at_several_levels_at_once():
    model = Twice()
    plain = model(X)
    intercept_at(model, "").add("mul", 0, Add(100))
    intercept_at(model, "block").add("relu", 1, Add(1))
    intercept_at(model, "block.inner").add("linear", 0, Add(0))
    assert torch.equal(model(X), plain + 2 + 100)


class Containers(nn.Module):
    """Calls modules that stand in containers, which have no forward of their own, and a grandchild directly."""

    def __init__(self):
        super().__init__()
        self.listed = nn.ModuleList([Residual(), Residual()])
        self.named = nn.ModuleDict({"a": Residual()})
        self.held = nn.Sequential(Residual(), nn.ReLU())

    def forward(self, x):
        for block in self.listed:
            x = block(x)
        x = self.named["a"](x)
        x = self.held[0](x)
        return F.relu(x) + 1


def test_what_a_later_hook_on_a_child_computes_is_not_the_parents():
    model = Twice()
    intercept_at(model, "block").add("add", 0, Add(10))
    seen = []
    model.block.inner.register_forward_hook(lambda _m, _x, y: seen.append(y + y))
    for _ in range(2):
        assert model(X).tolist() == [[78.0, 96.0]]
    assert seen[0].tolist() == [[2.0, 4.0]]


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_later_hook_before_the_forward_computes_is_not_the_modules(compiled):
    if compiled:
        torch.compiler.reset()
    model = Twice()
    intercept_at(model, "block").add("add", 0, Add(10))
    model.block.register_forward_pre_hook(lambda _m, args: (args[0] + args[0] - args[0],))
    run = torch.compile(model, backend="eager") if compiled else model
    for _ in range(2):
        assert run(X).tolist() == [[78.0, 96.0]]


@pytest.mark.parametrize("paths", [("inner", ""), ("", "inner")])
def test_what_a_tap_on_a_childs_input_computes_is_not_the_parents(paths):
    model = Residual()
    taps = {"inner": ("input", Add(10)), "": ("add", nn.Linear(2, 2, bias=False))}  # the first adds, as the parent does
    nn.init.eye_(taps[""][1].weight).data.mul_(2)
    for path in paths:
        operator, tap = taps[path]
        intercept_at(model, path).add(operator, 0, tap)
    # inner: 1 + 10; the parent's first addition: 11 + 1, which its tap doubles; relu, and the second addition
    assert model(torch.ones(1, 2)).tolist() == [[25, 25]]


def test_calls_of_modules_in_containers_are_not_the_parents():
    model = Containers()
    plain = model(X)
    intercept = intercept_at(model, "")
    intercept.add("add", 0, Add(100))
    assert torch.equal(model(X), plain + 100)
    assert intercept.counts == {"relu": 1, "add": 1, "input": 1}


class OwnWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2))

    def forward(self, x):
        return torch.where(x @ self.weight > 0, x, x * 2)


@pytest.mark.parametrize("masked_first", [True, False])
def test_calls_of_a_mask_are_not_those_of_the_module_that_it_stands_on(masked_first):
    model = OwnWeight()
    plain = model(X)
    plan = Plan("mask", (Mask(TensorPlace("", "weight"), torch.ones(2, 2, dtype=torch.bool)),))
    if masked_first:
        apply(model, plan, in_place=True)
    intercept_at(model, "").add("where", 0, Add(7))
    if not masked_first:
        apply(model, plan, in_place=True)
    assert torch.equal(model(X), plain + 7)
    assert parametrize.is_parametrized(model, "weight")


def test_inputs_are_tapped_by_position():
    class Sum(nn.Module):
        def forward(self, a, b, *, c=0.0):
            return a + 2 * b + c

    model = Sum()
    intercept_at(model, "").add("input", 1, Add(1))
    assert model(X, X, c=1.0).tolist() == (3 * X + 3).tolist()


def test_a_sequential_root_is_intercepted_and_keeps_its_outputs():
    model = nn.Sequential(Residual(), nn.ReLU())
    plain = model(X)
    intercept_at(model, "").add("input", 0, Add(0))
    assert torch.equal(model(X), plain)
    intercept_at(model, "1").add("relu", 0, Add(3))
    assert torch.equal(model(X), plain + 3)


def test_a_second_tap_on_a_place_comes_after_the_first():
    class Double(nn.Module):
        def forward(self, x):
            return x * 2

    model = Residual()
    plain = model(X)
    intercept_at(model, "").add("add", 1, Add(1))
    intercept_at(model, "").add("add", 1, Double())
    assert torch.equal(model(X), (plain + 1) * 2)


@pytest.mark.parametrize("where", ["inner", ""])
def test_an_exception_leaves_no_mode_behind(where):
    model = Twice()
    for path in ("", "block", "block.inner"):
        intercept_at(model, path).add("mul", 0, Add(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.ones(1, 3))
    assert _get_current_function_mode_stack() == []
    plain = Twice()(X)
    assert torch.equal(model(X), plain + 1)


def test_a_tap_that_raises_leaves_no_mode_behind():
    class Refuse(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    model = Twice()
    intercept_at(model, "block").add("relu", 0, Refuse())
    with pytest.raises(ValueError, match="no"):
        model(X)
    assert _get_current_function_mode_stack() == []


def test_a_deep_copy_has_taps_and_counts_of_its_own():
    model = Twice()
    plain = model(X)
    intercept_at(model, "block").add("relu", 1, Add(1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.block.get_submodule(CHILD).taps["relu_1"].amount.fill_(50)
    assert torch.equal(model(X), plain + 2) and torch.equal(other(X), plain + 100)
    intercept_at(other, "block").add("relu", 0, Add(1000))
    assert torch.equal(model(X), plain + 2)
    assert model.block.get_submodule(CHILD).counts["relu"] == 2


def test_installing_twice_gives_the_same_intercept():
    model = Twice()
    first = intercept_at(model, "block")
    assert intercept_at(model, "block") is first and isinstance(first, Intercept)
    assert len(model._forward_pre_hooks) == 1


def test_gradients_reach_the_taps_parameters():
    model = Twice()
    intercept_at(model, "block").add("relu", 1, Add(1))
    model(X).sum().backward()
    assert model.block.get_submodule(CHILD).taps["relu_1"].amount.grad.item() == 4.0


def test_taps_are_in_the_exported_program():
    model = Twice().eval()
    intercept_at(model, "block").add("relu", 1, Add(1))
    program = torch.export.export(model, (X,), strict=False)
    assert torch.equal(program.module()(X), model(X))


class Body(nn.Module):
    """Calls one block twice; nothing of its own is tapped."""

    def __init__(self):
        super().__init__()
        self.block = Residual()

    def forward(self, x):
        return self.block(self.block(x))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Body()

    def forward(self, x):
        return self.body(x) + self.body.block(x)


def test_parts_called_directly_count_from_zero_each_time_and_the_whole_counts_through():
    model = Whole()
    plain, part, block = model(X), model.body(X), model.body.block(X)
    intercept_at(model, "body.block").add("relu", 1, Add(1))
    for net in (model, copy.deepcopy(model)):
        for _ in range(2):
            assert torch.equal(net(X), plain + 1)
            assert torch.equal(net.body(X), part + 1)
            assert torch.equal(net.body.block(X), block)  # one call: it has no second relu
    assert torch.equal(copy.deepcopy(model.body)(X), part + 1)


def test_a_third_call_in_one_forward_is_the_third():
    model = Whole()
    plain = model(X)
    intercept_at(model, "body.block").add("relu", 2, Add(1))
    assert torch.equal(model(X), plain + 1) and torch.equal(model.body(X), model.body.block(model.body.block(X)))


def test_a_module_that_calls_itself_is_one_pass():
    class Recursive(nn.Module):
        def forward(self, x, depth=3):
            return F.relu(x) + (self(x, depth - 1) if depth > 1 else 0)

    model = Recursive()
    plain = model(X)
    intercept_at(model, "").add("relu", 2, Add(1))
    for _ in range(2):
        assert torch.equal(model(X), plain + 1)


@pytest.mark.parametrize("stopped, then", [("", ""), ("", "body"), ("body", ""), ("body.block", "body")])
def test_a_pass_cleans_up_after_ctrl_c(stopped, then):
    class Stop(nn.Module):
        armed = False

        def forward(self, x):
            if self.armed:
                raise KeyboardInterrupt
            return x

    model, stop = Whole(), Stop()
    for path in ("", "body", "body.block", "body.block.inner"):
        intercept_at(model, path).add("add", 0, Add(0))
    intercept_at(model, "body.block").add("relu", 0, stop)
    expected = model.get_submodule(then)(X)
    outer = torch.device("cpu")  # a mode of the user's own must survive
    with outer:
        stop.armed = True
        with pytest.raises(KeyboardInterrupt):
            model.get_submodule(stopped)(X)
        stop.armed = False
        assert len(_get_current_function_mode_stack()) > 1
        assert torch.equal(model.get_submodule(then)(X), expected)
        assert len(_get_current_function_mode_stack()) == 1
    assert _get_current_function_mode_stack() == []
    assert torch.equal(model.get_submodule(then)(X), expected)


class Choosy(nn.Module):
    def forward(self, x):
        y = x + 1
        if y.sum() > 0:  # which cannot be captured
            y = y + 1
        return y


def test_a_capture_that_fails_leaves_nothing_of_its_pass_behind():
    model = nn.Sequential(Choosy(), nn.Linear(2, 4))
    intercept_at(model, "0").add("add", 0, Add(1))
    expected = model(X)
    with pytest.raises(GraphError, match="cannot be captured"):
        trace(model, (X,))
    assert _get_current_function_mode_stack() == [] and not intercept_at(model, "0").passes.running
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_export_after_a_pass_that_was_broken_off_counts_from_zero(by_hand):
    def stop(module, args, result):
        raise KeyboardInterrupt

    model = Twice()
    intercept_at(model, "block").add("relu", 0, Add(1))
    expected = model(X)
    handle = model.block.inner.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    assert _get_current_function_mode_stack()
    if by_hand:
        end_passes(model)
        assert _get_current_function_mode_stack() == []
    exported = torch.export.export(model, (X,), strict=False)
    assert _get_current_function_mode_stack() == []
    assert torch.equal(exported.module()(X), expected)
