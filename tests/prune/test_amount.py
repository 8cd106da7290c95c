"""How much goes where: scopes, targets, alignment, equal shares."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tersor.core.errors import InputError
from tersor.core.place import ByName
from tersor.core.step import Context, Pipeline, Result, Step
from tersor.core.task import Task
from tersor.measure.compute import macs
from tersor.measure.size import parameters
from tersor.prune.structured.amount import Keep, bloc, choose
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.iterative import prune_iteratively
from tersor.prune.structured.scores import Random, Score


@dataclass(frozen=True, eq=False)
class Channels:
    """What the amounts know of a group."""

    name: str
    units: int
    channels: int


def blocs_of(*sizes, scores=None, minimum=1, max_sparsity=None, stages=None):
    """A bloc for each entry: unit counts of its groups; one channel a unit."""
    made = []
    for number, units in enumerate(sizes):
        units = units if isinstance(units, tuple) else (units,)
        groups = [Channels(f"{number}.{n}", count, count) for n, count in enumerate(units)]
        rng = np.random.default_rng(number)
        values = [rng.random(count) for count in units] if scores is None else [np.array(scores[number], dtype=float)]
        made.append(
            bloc(
                groups, values, before=units[0], stage=stages[number] if stages else 0, minimum=minimum,
                max_sparsity=max_sparsity,
            )
        )  # fmt: skip
    return made


def counts(blocs, sparsity, scope="layer", multiple_of=1):
    choice = choose(blocs, [sparsity] * len(blocs), scope, multiple_of, None)
    return [int(level) for level in choice.levels]


# Scopes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sparsity", "left"), [(0, 10), (0.1, 9), (0.3, 7), (0.7, 3), (0.29, 8), (0.99, 1)])
def test_a_layer_loses_the_fraction_that_was_written_rounded_in_its_favour(sparsity, left):
    assert counts(blocs_of(10), sparsity) == [left]


def test_globally_the_lowest_scores_of_all_go_and_one_unit_always_stays():
    blocs = blocs_of(4, 4, scores=([1, 2, 3, 4], [5, 6, 7, 8]))
    assert counts(blocs, 0.25, "global") == [2, 4]
    assert counts(blocs, 0.5, "global") == [1, 3]
    assert counts(blocs, 0.99, "global") == [1, 1]


def test_in_a_stage_only_groups_of_the_same_resolution_compete():
    scores = ([1, 2, 3, 4], [5, 6, 7, 8], [10, 10, 90, 90], [40, 50, 60, 70])
    blocs = blocs_of(4, 4, 4, 4, scores=scores, stages=(0, 0, 1, 1))
    assert counts(blocs, 0.25, "stage") == [2, 4, 2, 4]
    assert counts(blocs, 0.5, "stage") == [1, 3, 2, 2]
    assert counts(blocs, 0.5, "global") == [1, 1, 2, 4]


@pytest.mark.parametrize("scope", ["layer", "stage", "global"])
def test_the_cap_and_the_minimum_hold_whatever_is_asked(scope):
    blocs = blocs_of(10, 20, minimum=3, max_sparsity=0.6, stages=(0, 1))
    assert counts(blocs, 0.98, scope) == [4, 8]
    assert counts(blocs_of(10, 20, minimum=3, stages=(0, 1)), 0.98, scope) == [3, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([1, 2, 6, 8, 12, 18, 24]), min_size=1, max_size=3), min_size=1, max_size=4),
    st.floats(0, 0.99), st.sampled_from(["layer", "stage", "global"]), st.sampled_from([1, 2, 3, None]),
)  # fmt: skip
def test_groups_that_share_keep_the_same_fraction_and_never_nothing(sizes, sparsity, scope, multiple_of):
    blocs = blocs_of(*map(tuple, sizes), stages=[n % 2 for n in range(len(sizes))])
    choice = choose(blocs, [sparsity] * len(blocs), scope, multiple_of, None)
    gone = 0
    for member, part in zip(blocs, choice.kept(), strict=True):
        kept = [int(part[group].sum()) if group in part else group.units for group in member.groups]
        assert min(kept) >= 1
        assert len({(group.units * kept[0], kept[0] * group.units) for group in member.groups}) >= 1
        assert all(left * member.groups[0].units == kept[0] * group.units
                   for left, group in zip(kept, member.groups, strict=True))  # fmt: skip
        if multiple_of is not None:
            whole = [group.units for group in member.groups]
            assert kept == whole or all(left % multiple_of == 0 for left in kept)
        gone += sum(group.units - left for group, left in zip(member.groups, kept, strict=True))
    whole = sum(group.units for member in blocs for group in member.groups)
    slack = 0.02 * whole if multiple_of is None else 0  # soft alignment may move all together by so much
    assert gone <= sparsity * whole + slack + 1e-9


def test_a_share_removes_each_groups_own_least_important_units():
    groups = [Channels("a", 4, 4), Channels("b", 2, 2)]
    made = bloc(groups, [np.array([4.0, 1, 3, 2]), np.array([1.0, 9])], before=4, stage=0, minimum=1, max_sparsity=None)
    (part,) = choose([made], [0.5], "layer", None, None).kept()
    assert part[groups[0]].tolist() == [True, False, True, False]
    assert part[groups[1]].tolist() == [False, True]


# Alignment -----------------------------------------------------------------------------------------------------------


def test_wide_groups_are_multiples_of_eight_and_all_together_lose_what_was_asked():
    blocs = blocs_of(*[64] * 20)
    choice = choose(blocs, [0.3] * 20, "layer", None, None)
    assert set(choice.levels) == {40, 48} and not any(choice.remarks)
    assert abs(sum(choice.levels) - 20 * 45) <= 0.02 * 20 * 64


def test_a_narrow_group_is_not_aligned_and_the_remark_says_why():
    choice = choose(blocs_of(16, 256), [0.3, 0.3], "layer", None, None)
    assert choice.levels.tolist() == [12, 176]
    assert choice.remarks == ("no multiple of 8: the nearest is too far from what is asked", "")


def test_a_group_is_not_aligned_where_all_together_would_miss_what_was_asked():
    choice = choose(blocs_of(64), [0.3], "layer", None, None)
    assert choice.levels.tolist() == [45] and "over 2 %" in choice.remarks[0]


def test_a_multiple_that_is_asked_for_is_met_at_any_cost():
    assert counts(blocs_of(16, 64, 8), 0.3, multiple_of=8) == [16, 48, 8]
    made = Channels("heads", 6, 6 * 12)
    blocs = [bloc([made], [np.arange(6.0)], before=6, stage=0, minimum=1, max_sparsity=None)]
    assert counts(blocs, 0.5, multiple_of=8) == [4]  # 4 × 12 channels


# Targets on a real model ----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Three resolutions, a residual branch; wide enough that a step of one channel is small."""

    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.c, self.fc = nn.Conv2d(2 * width, 3 * width, 1), nn.Linear(3 * width, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.b(F.relu(self.a(x)))
        x = F.relu(self.c(F.relu(self.down(x))))
        return self.fc(x.mean((2, 3)))


INPUTS = (torch.randn(2, 3, 12, 12),)


def task_of(net):
    return Task(net, example_inputs=INPUTS)


def plan_of(net, **given):
    return PruneChannels(**{"score": Random(), **given}).plan(net, task_of(net))


def run(net, **given):
    return PruneChannels(**{"score": Random(), **given}).run(net, task_of(net)).model


def bytes_of(model):
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


COUNT = {
    "macs": lambda model: macs(model, INPUTS).value,
    "parameters": lambda model: parameters(model).value,
    "bytes": bytes_of,
}


@pytest.mark.parametrize(
    ("what", "scope", "fraction"),
    [("macs", "layer", 0.45), ("macs", "stage", 0.8), ("macs", "global", 0.2), ("parameters", "layer", 0.8),
     ("bytes", "global", 0.45)],
)  # fmt: skip
def test_a_target_is_met_to_within_two_per_cent(what, scope, fraction):
    net = Net()
    left = COUNT[what](run(net, keep=Keep(**{what: fraction}), scope=scope)) / COUNT[what](net)
    assert abs(left / fraction - 1) <= 0.02


@pytest.mark.parametrize("what", ["macs", "bytes"])
def test_a_number_above_one_is_absolute(what):
    net = Net()
    target = round(0.6 * COUNT[what](net))
    assert abs(COUNT[what](run(net, keep=Keep(**{what: target}))) / target - 1) <= 0.02


def test_the_plan_says_what_is_left_and_counts_are_aligned_where_the_target_allows():
    plan = plan_of(Net(64), keep=Keep(macs=0.45))
    place, text = plan.lines[-1]
    assert place == "<model>" and "MACs" in text and "asked for 0.45" in text
    aligned = [int(what.split(" -> ")[1].split()[0]) % 8 == 0 for place, what in plan.lines[:-1]]
    assert sum(aligned) >= 3
    remarked = ["no multiple of 8" in what for place, what in plan.lines[:-1]]
    assert [not flag for flag in aligned] == remarked


def test_a_hard_multiple_and_a_target_hold_together():
    net = Net(64)
    shrunk = run(net, keep=Keep(macs=0.45), multiple_of=4, scope="global")
    assert abs(COUNT["macs"](shrunk) / COUNT["macs"](net) / 0.45 - 1) <= 0.02
    assert all(layer.out_channels % 4 == 0 for layer in shrunk.modules() if isinstance(layer, nn.Conv2d))


def test_a_target_that_is_met_already_changes_nothing():
    plan = plan_of(Net(), keep=Keep(parameters=10**9))
    assert not plan.edits and len(plan.skips) >= 4


@pytest.mark.parametrize("what", ["macs", "parameters"])
def test_a_target_out_of_reach_names_the_nearest_that_is_met(what):
    net = Net(8)
    with pytest.raises(InputError, match="cannot be met") as caught:
        plan_of(net, keep=Keep(**{what: 0.0001}), max_sparsity=0.5)
    nearest = int(caught.value.expected.split("(")[1].split(" of ")[0].replace(",", ""))
    assert COUNT[what](run(net, keep=Keep(**{what: nearest}), max_sparsity=0.5)) == nearest


def test_a_target_between_the_steps_of_few_channels_names_both_neighbours():
    net = nn.Sequential(nn.Linear(10, 4), nn.ReLU(), nn.Linear(4, 2))
    task = Task(net, example_inputs=(torch.randn(2, 10),))
    with pytest.raises(InputError, match="cannot be met") as caught:
        PruneChannels(keep=Keep(macs=0.6), score=Random()).plan(net, task)
    assert "0.5 (24 of 48 MACs) or 0.75 (36 of 48 MACs)" in str(caught.value)
    assert PruneChannels(keep=Keep(macs=0.75), score=Random()).plan(net, task).edits


@pytest.mark.parametrize(
    "given",
    [{}, {"macs": 0}, {"macs": -1}, {"macs": math.nan}, {"bytes": math.inf}, {"macs": 0.5, "bytes": 0.5}],
    ids=str,
)
def test_a_target_is_one_positive_number(given):
    with pytest.raises(InputError, match=r"Keep"):
        Keep(**given)


# Fractions by name ----------------------------------------------------------------------------------------------------


def lines(plan):
    return {place: what.split(" of ")[0] for place, what in plan.lines}


def test_the_first_pattern_that_matches_says_how_much_and_the_rest_stays():
    plan = plan_of(Net(), sparsity={"a": 0.25, "[ac]": 0.5, "down": 0})
    assert lines(plan) == {"a": "32 -> 24", "c": "96 -> 48"}
    assert lines(plan_of(Net(), sparsity={"b": 0.5})) == {"stem": "32 -> 16"}  # b makes the stem's channels too


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(InputError, match=r"no layer that makes channels.*downn.*Nearest names: down"):
        plan_of(Net(), sparsity={"*": 0.5, "downn": 0.2})


def test_a_frozen_layer_that_is_insisted_on_is_an_error_and_one_among_others_a_skip():
    with pytest.raises(InputError, match=r"fc.*frozen: reaches the model's output"):
        plan_of(Net(), sparsity={"a": 0.5, "fc": 0.5})
    with pytest.raises(InputError, match="frozen"):
        plan_of(Net(), sparsity={"f*": 0.5})
    plan = plan_of(Net(), sparsity={"*": 0.5})
    assert [skip.place for skip in plan.skips] == ["fc"] and len(plan.lines) == 4


@pytest.mark.parametrize(
    "given",
    [
        {"sparsity": {"a": 1.0}}, {"sparsity": {"a": -0.5}}, {"sparsity": {"a": 0.5}, "scope": "global"},
        {"sparsity": 0.5, "keep": Keep(macs=0.5)}, {"heads": "some"}, {"relative_to": "last"}, {"scope": "block"},
    ],
    ids=str,
)  # fmt: skip
def test_amounts_that_contradict_themselves_are_refused(given):
    with pytest.raises(InputError, match="PruneChannels"):
        PruneChannels(**given)


# Rounds ---------------------------------------------------------------------------------------------------------------


class Bias(Score):
    """The bias of a unit's first producer: a number that stays with the unit, whatever else goes."""

    def units(self, model, task, groups):
        firsts = [group.producers[0] for group in groups]
        return [model.get_submodule(a.place.module).bias.detach().double()[a.positions[a.units]] for a in firsts]


@dataclass(frozen=True)
class Rest(Step):
    """A recovery that notes the widths it is given."""

    def run(self, model, task, context=None):
        seen = [layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        return Result(model, history=({"widths": seen},))


def widths(net, pipeline):
    return [entry["widths"] for entry in pipeline.run(net, task_of(net), Context()).history]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_end_where_one_shot_would_and_do_not_add_up_roundings(scope):
    net = Net(20)
    method = PruneChannels(scope=scope, multiple_of=1)
    pipeline = prune_iteratively(3, 0.7, recovery=Rest(), score=Bias(), method=method)
    assert isinstance(pipeline, Pipeline) and len(pipeline.steps) == 6
    found = widths(net, pipeline)
    once = run(net, sparsity=0.7, scope=scope, multiple_of=1, score=Bias())
    assert len(found) == 3
    assert found[-1] == [layer.out_channels for layer in once.modules() if isinstance(layer, nn.Conv2d)]
    if scope == "layer":  # 20 · 0.7 / 3 = 4.67, 40 · 0.7 / 3 = 9.33, 60 · 0.7 / 3 = 14
        assert found == [[16, 16, 16, 31, 46], [11, 11, 11, 22, 32], [6, 6, 6, 12, 18]]


def test_rounds_towards_a_target_approach_it_as_fractions_of_the_original():
    net = Net(24)
    pipeline = prune_iteratively(2, keep=Keep(macs=0.4), recovery=Rest(), score=Bias())
    model, left = net, []
    for step in pipeline.steps:
        model = step.run(model, task_of(net)).model
        left.append(COUNT["macs"](model) / COUNT["macs"](net))
    assert left[0] == left[1] == pytest.approx(0.7, rel=0.02) and left[3] == pytest.approx(0.4, rel=0.02)


def test_rounds_of_fractions_by_name():
    pipeline = prune_iteratively(2, {"a": 0.5, "c": 0.25}, recovery=Rest())
    assert [step.sparsity for step in pipeline.steps[::2]] == [{"a": 0.25, "c": 0.125}, {"a": 0.5, "c": 0.25}]
    assert widths(Net(16), pipeline)[-1] == [16, 8, 16, 32, 36]


def test_rounds_refuse_what_they_cannot_divide_and_another_models_original():
    with pytest.raises(InputError, match="steps"):
        prune_iteratively(0, 0.5, recovery=Rest())
    with pytest.raises(InputError, match="absolute"):
        prune_iteratively(2, keep=Keep(bytes=10_000), recovery=Rest())
    with pytest.raises(InputError, match="one of sparsity and keep"):
        prune_iteratively(2, 0.5, keep=Keep(macs=0.5), recovery=Rest())
    wide, narrow = Net(16), Net(8)
    with pytest.raises(InputError, match="no such channels to relate to"):
        PruneChannels(0.5, relative_to="original").plan(wide, task_of(narrow))


def test_where_still_limits_what_a_target_may_take():
    plan = plan_of(Net(), keep=Keep(macs=0.9), where=~ByName("a"))
    assert "a" not in lines(plan) and lines(plan)
