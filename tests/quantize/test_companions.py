"""Companions of quantisation-aware training: frozen steps; oscillating weights against the paper's algorithm."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.core.step import Context, Every
from tersor.core.task import Task
from tersor.prune.sparse.gradual import GradualSparsity
from tersor.prune.sparse.prune import Prune
from tersor.quantize.freeze import FreezeScales
from tersor.quantize.oscillation import FreezeOscillation
from tersor.quantize.spread import ScaleSpread
from tersor.quantize.standing import learnt_quantizers
from tersor.train.companion import Moment
from tersor.train.finetune import Finetune
from tersor.train.objective import Forward, TaskLoss
from tersor.train.optimizer import Optimizer
from tersor.train.together import Together


def network(learn=True, group_size=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    edits = []
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        rows = weight.detach().abs().reshape(len(weight), -1, group_size or weight.shape[1])
        scale = rows.amax(2) / 7 if group_size else rows.amax(2)[:, 0] / 7
        grid = {"axis": 0, "learn": learn, "group_size": group_size}
        zero = torch.zeros_like(scale, dtype=torch.int32)
        edits.append(Quantizer((TensorPlace(name, "weight"),), scale, zero, -8, 7, **grid))
    return apply(model, Plan("four bits", tuple(edits)))


def task_of(model, batches=6):
    generator = torch.Generator().manual_seed(1)
    data = []
    for _ in range(batches):
        x = torch.randn(16, 6, generator=generator)
        data.append((x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()))
    return Task(model, data, data, data).complete()


def scales(model):
    return [quantizer.scale.detach().clone() for quantizer in learnt_quantizers(model)]


FAST = Optimizer(lr=0.2)


@pytest.mark.parametrize("optimizer", [FAST, Optimizer("adamw", lr=0.02)], ids=["sgd", "adamw"])
def test_steps_stand_still_from_the_moment_on_and_weights_do_not(optimizer):
    model = network()
    seen = []

    class Watching(FreezeScales):
        def after_step(self, moment):
            seen.append((scales(moment.model), moment.model[0].parametrizations.weight.original.detach().clone()))

    result = Finetune(epochs=2, optimizer=optimizer, companion=Watching(0.5), keep="last").run(model, task_of(model))
    steps, weights = zip(*seen, strict=True)
    moved = [not all(map(torch.equal, a, b)) for a, b in zip(steps, steps[1:], strict=False)]
    assert moved == [True] * 5 + [False] * 6
    assert not any(map(torch.equal, weights, weights[1:]))
    assert all(map(torch.equal, scales(result.model), steps[-1])) and not result.plans
    assert all(quantizer.log_growth is not None for quantizer in learnt_quantizers(result.model)), "still parameters"


def by_hand(positions, momentum, threshold):
    """Algorithm 1 of the paper for one number: (frequency, integers in force, when it was frozen)."""
    frequency, mean, last, direction, frozen, told = 0.0, float(positions[0]), positions[0], 0, None, []
    for time, now in enumerate(positions[1:], start=1):
        now = last if frozen is not None else now
        sign = (now > last) - (now < last)
        frequency += momentum * ((sign * direction < 0) - frequency)
        mean += momentum * (now - mean)
        direction, last = sign or direction, now
        if frequency > threshold and frozen is None:
            frozen, last = time, round(mean)
        told.append((frequency, last))
    return told, frozen


def test_frequencies_means_and_freezing_follow_the_papers_algorithm_number_by_number():
    model = network(learn=False)
    companion = FreezeOscillation(first=0.7, last=0.7, momentum=0.2)
    companion.begin(model, None)
    step = model[0].parametrizations.weight[0].scale[:, None]
    generator = torch.Generator().manual_seed(5)
    stored = model[0].parametrizations.weight.original
    positions = [torch.round(stored.detach() / step).clamp(-8, 7)]
    found = []
    for done in range(1, 25):
        integers = torch.randint(-1, 3, stored.shape, generator=generator).float()
        positions.append(integers)
        with torch.no_grad():
            stored.copy_(integers * step + 0.3 * step * torch.rand(stored.shape, generator=generator))
        companion.after_step(Moment(model, None, None, done, 24))
        swing = model.tersor_training.parts["oscillation"][0]
        found.append((swing.frequency.clone(), swing.integer.clone()))
    froze = 0
    for row in range(8):
        for column in range(6):
            told, frozen = by_hand([int(p[row, column]) for p in positions], 0.2, 0.7)
            froze += frozen is not None
            for (frequency, integer), (ours, place) in zip(told, found, strict=True):
                assert float(ours[row, column]) == pytest.approx(frequency, abs=1e-6)
                assert int(place[row, column]) == integer
    assert 5 < froze < 48
    noted = companion.noted(model)
    assert noted["frozen weights"] == pytest.approx(froze / (48 + 24))
    companion.finish(model)
    assert "tersor_training" not in dict(model.named_children())


@pytest.mark.parametrize("group_size", [None, 2])
def test_frozen_weights_stay_on_their_integer_while_steps_learn_and_the_rest_trains(group_size):
    model = network(group_size=group_size)
    companion = FreezeOscillation(first=0.02, last=0.01, momentum=0.1)
    training = Finetune(epochs=6, optimizer=Optimizer(lr=0.3, momentum=0.5), companion=companion, keep="last")
    result = training.run(model, task_of(model))
    told = [entry["noted"] for entry in result.history]
    assert 0 < told[-1]["frozen weights"] < 1 and told[0].keys() == {"oscillating weights", "frozen weights"}
    assert [entry["frozen weights"] for entry in told] == sorted(entry["frozen weights"] for entry in told)
    stored, weight = result.model[0].parametrizations.weight.original, result.model[0].weight
    on_grid = torch.isclose(stored, weight, atol=1e-6).float().mean()
    assert on_grid >= 0.5 * told[-1]["frozen weights"], "what is frozen stands on the grid"


def test_counting_alone_changes_no_weight():
    model = network()
    training = Finetune(epochs=2, optimizer=FAST, keep="last")
    alone = training.run(model, task_of(model)).model
    counted = Finetune(epochs=2, optimizer=FAST, keep="last", companion=FreezeOscillation(last=None, momentum=0.3))
    result = counted.run(model, task_of(model))
    assert all(map(torch.equal, alone.state_dict().values(), result.model.state_dict().values()))
    assert result.history[-1]["noted"]["frozen weights"] == 0 < result.history[-1]["noted"]["oscillating weights"]


def test_masked_weights_neither_swing_nor_come_back():
    model = network()
    keep = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) > 0.5
    model = apply(model, Plan("zeros", (Mask(TensorPlace("0", "weight"), keep),)))
    training = Finetune(epochs=3, optimizer=FAST, companion=FreezeOscillation(0.02, 0.01, 0.2), keep="last")
    model = training.run(model, task_of(model)).model
    assert bool((model[0].weight[~keep] == 0).all()) and bool((model[0].weight[keep] != 0).any())


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path):
    model, every = network(), Every(batches=1)
    parts = (GradualSparsity(Prune(0.5), end=0.6, updates=4), FreezeScales(0.7), FreezeOscillation(0.02, 0.01, 0.2))
    training = Finetune(epochs=3, optimizer=FAST, companion=Together(parts), keep="last")
    whole = training.run(model, task_of(model), Context(folder=tmp_path / "whole"))

    class Stop(Exception):
        pass

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 11:
            raise Stop
        return F.cross_entropy(model(batch[0]), batch[1])

    calls, task = [], task_of(model)
    broken = Task(model, task.train, task.validation, task.test, loss=loss).complete()
    context = Context(folder=tmp_path / "stopped", every=every)
    with pytest.raises(Exception, match="Stop"):
        training.run(model, broken, context)
    resumed = training.run(model, broken, context)
    assert len(calls) < 2 * 18 + 3, "it went on from where it was"
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))
    assert whole.history[-1]["noted"] == resumed.history[-1]["noted"]
    assert [edit.place for plan in whole.plans for edit in plan.edits] == [
        TensorPlace("0", "weight"), TensorPlace("2", "weight"),
    ]  # fmt: skip


def test_the_spread_of_scales_is_their_variance_and_shrinks_when_it_is_trained():
    model = network()
    task = task_of(model)
    logs = [quantizer.scale.detach().log() for quantizer in learnt_quantizers(model)]
    wanted = sum(((log - log.mean()) ** 2).mean() for log in logs) / 2
    got = ScaleSpread(3.0).of(Forward(model, task.train[0], task))
    assert float(got.detach()) == pytest.approx(3 * float(wanted), rel=1e-5)
    training = Finetune(epochs=4, optimizer=Optimizer(lr=0.05), keep="last")
    spread = {}
    for strength in (0.0, 5.0):
        objective = TaskLoss() + ScaleSpread(strength)
        trained = Finetune(**{**vars(training), "objective": objective}).run(model, task).model
        spread[strength] = float(ScaleSpread(1.0).of(Forward(trained, task.train[0], task)).detach())
    assert spread[5.0] < 0.3 * spread[0.0]


def test_what_has_nothing_to_do_says_so():
    plain = nn.Sequential(nn.Linear(6, 3))
    for companion, match in (
        (FreezeScales(), "no quantiser learns"), (FreezeOscillation(), "no weight has a quantiser of at most 4 bits"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            companion.begin(copy.deepcopy(plain), None)
    with pytest.raises(InputError, match="no quantiser learns"):
        FreezeScales().begin(network(learn=False), None)
    with pytest.raises(InputError, match="2 quantisers of more"):
        FreezeOscillation(most_bits=3).begin(network(), None)
    with pytest.raises(InputError, match="several learnt steps"):
        ScaleSpread().of(Forward(network(learn=False), None, task_of(plain)))
    for made, match in (
        (lambda: FreezeScales(1.0), "FreezeScales.start"), (lambda: FreezeOscillation(0.01, 0.02), "out of order"),
        (lambda: FreezeOscillation(momentum=1), "momentum"), (lambda: ScaleSpread(math.inf), "ScaleSpread.strength"),
        (lambda: Together(()), "nobody"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            made()
