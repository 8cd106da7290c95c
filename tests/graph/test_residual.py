import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.graph.residual import Residuals, above, common_module
from tersor.graph.trace import trace


class Net(nn.Module):
    """A stem, one block given by ``forward``'s second half, a head."""

    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6), block, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


class Parts(nn.Module):
    """Layers a, b, c, and what ``how`` makes of them and the input."""

    def __init__(self, how, **extra):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        for name, module in extra.items():
            self.add_module(name, module)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


def residuals(block):
    net = Net(block).eval()
    return Residuals(trace(net, (torch.randn(2, 5, 6),)), net)


def modules(how, **extra):
    return [branch.modules for branch in residuals(Parts(how, **extra)).branches]


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: x + m.b(F.relu(m.a(x))),
        lambda m, x: m.b(F.relu(m.a(x))) + x,
        lambda m, x: m.b(F.relu(m.a(x))).add_(x),
        lambda m, x: F.dropout(x, 0.5, m.training) + m.b(m.a(x)).contiguous(),
        lambda m, x: x.to(torch.float32) + m.b(m.a(x)),
        lambda m, x: m.norm(x + m.b(m.a(x).tanh() * torch.sigmoid(m.a.bias))),
        lambda m, x: x.view(2, 5, 6) + m.b(m.a(x).reshape(10, 6)).reshape(2, 5, 6),
    ],
)
def test_an_addition_of_a_value_and_what_is_computed_from_it_is_a_residual_branch(how):
    assert modules(how) == [("block.a", "block.b")]


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.b(x) + m.b.bias,  # a table beside
        lambda m, x: m.b(m.a(x)),
        lambda m, x: x + x.mean(-1, keepdim=True),  # nothing learnt
        lambda m, x: m.a(x) * x,
        lambda m, x: 0.5 * x + m.a(x),  # the shortcut is scaled
        lambda m, x: torch.add(m.a(x), x, alpha=2),
        lambda m, x: x.mean(1, keepdim=True) + m.a(x),
    ],
)
def test_other_additions_are_none(how):
    assert modules(how) == []


def reasons(how, **extra):
    return [(other.place, other.reason) for other in residuals(Parts(how, **extra)).unremovable]


def test_a_projection_on_the_shortcut_is_named():
    assert reasons(lambda m, x: m.c(x) + m.b(m.a(x).relu())) == [
        ("block", "its shortcut is computed too (a projection: block.c)")
    ]


def test_a_branch_that_is_read_elsewhere_is_named_with_its_reader():
    def how(m, x):
        y = m.b(m.a(x))
        return m.norm(x + y) * y.sigmoid()

    assert reasons(how) == [("block", "its branch is read elsewhere: by block:sigmoid[0]")]


def test_a_layer_that_is_called_again_elsewhere_keeps_the_branch():
    ((place, reason),) = reasons(lambda m, x: m.b(x + m.b(m.a(x))))
    assert place == "block" and reason.startswith("block.b.weight is read elsewhere too (tied): by block.b:linear[1]")


def test_tied_weights_keep_the_branch():
    block = Parts(lambda m, x: m.c(x + m.b(m.a(x))))
    block.c.weight = block.b.weight
    assert "is read elsewhere too (tied): by block.c:linear[0]" in residuals(block).unremovable[0].reason


def test_what_the_branch_shares_with_others_does_not_go_with_it():
    def how(m, x):
        shared = m.c(x)
        return (x + m.b(m.a(shared)) * shared.sigmoid()) * shared

    (branch,) = residuals(Parts(how)).branches
    assert branch.modules == ("block.a", "block.b")


def test_parallel_branches_go_together_and_their_sum_is_no_projection():
    def how(m, x):
        y = m.norm(x)
        return m.a(y) + m.b(y) + x

    found = residuals(Parts(how))
    assert [branch.modules for branch in found.branches] == [("block.norm", "block.a", "block.b")]
    assert not found.unremovable


def test_consecutive_and_nested_branches_are_found_each():
    def how(m, x):
        x = x + m.a(m.norm(x))
        y = m.b(x)
        return x + m.c(y + m.inner(y))

    first, inner, outer = modules(how, inner=nn.Linear(6, 6))
    assert first == ("block.norm", "block.a") and inner == ("block.inner",)
    assert outer == ("block.b", "block.inner", "block.c")


def test_a_module_with_other_work_is_not_removed_but_what_it_holds_is():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.mine, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.mine(x), self.other(x)

    def how(m, x):
        y, z = m.two(x)
        return (x + m.a(y)) * z

    assert modules(how, two=Two()) == [("block.two.mine", "block.a")]


def plus(layer, x):
    return x + layer(x)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda m, x: plus(m.a, x), True),
        (lambda m, x: F.relu(x + m.a(x)), False),  # what came in was not clamped
        (lambda m, x: m.norm(x + m.a(x)), False),
        (lambda m, x: plus(m.a, x.flatten(0, 1)).view(2, 5, 6), True),
        (lambda m, x: plus(m.a, x.flatten(0, 1)), False),  # another shape
        (lambda m, x: (x + m.a(x)) * 2, False),
    ],
)
def test_a_module_gives_its_input_back_only_if_nothing_else_is_left(how, expected):
    found = residuals(Parts(how))
    assert len(found.branches) == 1 and found.gives_back("block", found.branches) is expected


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (nn.ReLU(), nn.ReLU(), True),
        (nn.Sequential(nn.ReLU(), nn.MaxPool1d(1)), nn.ReLU(), True),
        (nn.ReLU6(), nn.ReLU6(), True),
        (nn.Hardtanh(-1, 1), nn.Hardtanh(-2, 2), False),
        (nn.Tanh(), nn.Tanh(), False),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.ReLU(), False),
    ],
)
def test_a_clamp_of_what_was_clamped_in_the_same_way_changes_nothing(before, after, expected):
    block = nn.Sequential(before, Parts(lambda m, x: m.after(x + m.a(x)), after=after))
    found = residuals(block)
    assert len(found.branches) == 1 and found.gives_back("block.1", found.branches) is expected


def test_paths_are_compared_by_whole_names():
    assert list(above("a.bc.d")) == ["", "a", "a.bc", "a.bc.d"] and list(above("")) == [""]
    assert common_module(["a.bc.d", "a.bc.e.f"]) == "a.bc" and common_module(["a.b", "a.bc"]) == "a"
    assert common_module(["a", ""]) == ""
