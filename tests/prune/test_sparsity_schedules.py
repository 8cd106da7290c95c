"""Sparsity over time: gradual, by movement, drop and grow, in rounds, dense-sparse-dense, lottery tickets."""

import copy
import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from tersor.core.apply import apply
from tersor.core.errors import InputError
from tersor.core.place import stored_at
from tersor.core.progress import Progress
from tersor.core.step import Context, Pipeline
from tersor.core.task import Metric, Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.prune.sparse.drop_and_grow import DropAndGrow, exchanged, train_sparse
from tersor.prune.sparse.elements import MagnitudeAverage, Movement, RandomWeights
from tersor.prune.sparse.gradual import GradualSparsity, prune_by_movement, prune_gradually
from tersor.prune.sparse.lottery import LotteryTicket, reinitialised
from tersor.prune.sparse.patterns import NM, Block, Rows
from tersor.prune.sparse.prune import Prune
from tersor.prune.sparse.rounds import first_epochs, last_epochs, prune_in_rounds, rewind_learning_rate
from tersor.prune.sparse.scopes import ErdosRenyi, Global, PerType
from tersor.prune.sparse.standing import standing_masks
from tersor.prune.sparse.unmask import dense_sparse_dense
from tersor.train import finetune
from tersor.train.average import Average
from tersor.train.companion import Companion, Moment
from tersor.train.finetune import Finetune
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import Constant, Cosine, OneCycle, Part

SIZES = {"0": 96, "4": 48}


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def make_task(**fields):
    """Three classes that a linear function tells apart; a network trained on them."""
    torch.manual_seed(0)
    x = torch.randn(240, 6)
    data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    train, held_out = (Subset(data, list(part)) for part in (range(160), range(160, 240)))
    loaders = {"train": DataLoader(train, 16, shuffle=True), "validation": DataLoader(held_out, 80)}
    return Task(**{"model": network(), **loaders, "test": loaders["validation"], **fields}).complete()


@pytest.fixture(scope="module")
def trained():
    task = make_task()
    return Finetune(epochs=6).run(task.model, task, Context(3)).model


def training(epochs=5, **fields):
    return Finetune(**{"epochs": epochs, "optimizer": Optimizer(lr=0.03), **fields})


def zeros(model):
    return {name: int((model.get_submodule(name).weight == 0).sum()) for name in SIZES}


def at(sparsity):
    return {name: math.floor(sparsity * size + 1e-9) for name, size in SIZES.items()}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


STEPS = {
    "gradual": prune_gradually(0.8, training=training()),
    "gradual, adamw": prune_gradually(0.8, training=training(optimizer=Optimizer("adamw", 0.01, weight_decay=0.5))),
    "gradual, n of m": prune_gradually(training=training(), prune=Prune(pattern=NM(1, 2))),
    "persistence": prune_gradually(0.8, training=training(), prune=Prune(score=MagnitudeAverage())),
    "movement": prune_by_movement(0.8, training=training(), prune=Prune()),
    "drop and grow": train_sparse(0.8, training=training(), prune=Prune()),
    "drop and grow, adamw": train_sparse(
        0.8, training=training(optimizer=Optimizer("adamw", 0.01, weight_decay=0.5)), prune=Prune()
    ),
}  # fmt: skip


def wanted(name):
    return at(0.5) if name.endswith("n of m") else at(0.8)


@pytest.mark.parametrize("name", STEPS)
def test_the_training_ends_with_exactly_the_zeros_and_can_be_saved_loaded_and_copied(name, trained, tmp_path):
    task, before = make_task(), state(trained)
    result = STEPS[name].run(trained, task, Context(1))
    assert zeros(result.model) == wanted(name)
    assert result.history[-1]["validation"] > 0.7
    assert same(state(trained), before)
    assert sum(len(plan.edits) for plan in result.plans) >= 2 and "zero" in str(result.plans[-1])
    save_artifact(tmp_path / "saved", result.model, original=trained, plans=result.plans)
    x = torch.randn(4, 6)
    assert torch.equal(load_artifact(tmp_path / "saved", network())(x), result.model(x))
    assert torch.equal(copy.deepcopy(result.model)(x), result.model(x))


class Interrupted(Progress):
    def track(self, items, description, total=None):
        for number, item in enumerate(items):
            if description == "epoch 4/5" and number == 7:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("name", STEPS)
def test_averaged_weights_have_the_zeros_too(name, trained):
    step = STEPS[name]
    *first, last = step.steps if isinstance(step, Pipeline) else [step]
    result = Pipeline((*first, dataclasses.replace(last, average=Average()))).run(trained, make_task(), Context(1))
    assert zeros(result.model) == wanted(name)


@pytest.mark.parametrize("name", STEPS)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights_and_masks(name, trained, tmp_path):
    task = make_task()
    whole = STEPS[name].run(trained, task, Context(1))
    with pytest.raises(KeyboardInterrupt):
        STEPS[name].run(trained, task, Context(1, tmp_path, Interrupted()))
    assert list(tmp_path.rglob("epoch-0003"))
    resumed = STEPS[name].run(trained, task, Context(1, tmp_path))
    assert same(state(resumed.model), state(whole.model)) and same(state(whole.model), state(resumed.model))
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in whole.history]


@pytest.mark.parametrize("name", ["gradual", "movement", "drop and grow"])
def test_zeros_survive_mixed_precision(name, trained, monkeypatch):
    monkeypatch.setattr(finetune, "multiplies_bf16", lambda device: True)
    step, half = STEPS[name], {"precision": "bf16", "clip": 1.0}
    step = (
        Pipeline((step.steps[0], training(companion=step.steps[1].companion, **half)))
        if isinstance(step, Pipeline)
        else training(companion=step.companion, **half)
    )
    result = step.run(trained, make_task(), Context(1))
    assert result.facts["precision"] == "bf16" and zeros(result.model) == wanted(name)


def test_two_processes_decide_the_same():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    program = [sys.executable, Path(__file__).with_name("sparse_in_two.py")]
    running = [
        subprocess.Popen(
            program, env={**os.environ, **together, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), outputs[0][1][-2000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second and first["processes"] == 2
    assert first["gradual"]["zeros"] == [76, 38]  # layer by layer
    assert sum(first["movement"]["zeros"]) == sum(first["drop and grow"]["zeros"]) == 115  # of all 144


class Course(Companion):
    """Goes with another companion and writes down the zeros after every step."""

    def __init__(self, other):
        self.other, self.course = other, []

    def begin(self, model, task):
        self.other.begin(model, task)

    def after_backward(self, moment):
        self.other.after_backward(moment)

    def after_step(self, moment):
        self.other.after_step(moment)
        self.course.append(sum(zeros(moment.model).values()))

    def settled(self, done, steps):
        return self.other.settled(done, steps)

    def expected(self, model, task):
        return self.other.expected(model, task)

    def finish(self, model):
        return self.other.finish(model)


def test_sparsity_rises_along_the_cubic_and_stays(trained):
    companion = Course(GradualSparsity(Prune(0.8, scope=Global()), start=0.2, end=0.6, updates=10))
    training(companion=companion).run(trained, make_task(), Context(1))
    assert len(companion.course) == 50
    for done, found in enumerate(companion.course, 1):
        updates = min(10, max(0, (done - 10) // 2))  # from step 10 to 30, every second step
        sparsity = 0.8 * (1 - (1 - updates / 10) ** 3)
        assert found == math.floor(sparsity * 144 + 1e-9), done


def test_a_dry_run_tells_the_counts_that_training_will_end_with(trained):
    task = make_task()
    for step in (STEPS["gradual"], STEPS["movement"]):
        plan = step.companion.expected(trained, task)
        assert zeros(apply(trained, plan)) == at(0.8)
    assert DropAndGrow().expected(trained, task) is None


def test_masks_only_grow_unless_weights_may_come_back(trained):
    for regrow in (False, True):
        companion = Course(GradualSparsity(Prune(0.5, score=Movement(), regrow=regrow), end=0.8, updates=30))
        seen = []
        companion.after_step = lambda moment, on=companion, seen=seen: (
            on.other.after_step(moment),
            seen.append(torch.cat([mask.keep.flatten() for _, mask in standing_masks(moment.model)])),
        )
        training(companion=companion).run(trained, make_task(), Context(1))
        returned = any(bool((later & ~earlier).any()) for earlier, later in zip(seen, seen[1:], strict=False))
        assert returned == regrow


def scripted(values):
    """A metric whose value after epoch n is values[n − 1], whatever the model does."""
    turns = iter(values)
    return Metric("scripted", lambda outputs, targets: torch.full((len(outputs),), next(turns)))


def test_only_epochs_with_all_zeros_in_place_can_be_the_best(trained):
    step = prune_gradually(0.8, training=training(epochs=6, patience=2), end=0.5)
    values = [0.9, 0.8, 0.3, 0.5, 0.4, 0.4]
    result = step.run(trained, make_task(metric=scripted(values)), Context(1))
    assert result.facts["kept_epoch"] == 4 and zeros(result.model) == at(0.8)
    assert len(result.history) == 6  # the first two, better and before the end, did not use up the patience
    early = prune_gradually(0.8, training=training(epochs=6, patience=1), end=0.5)
    result = early.run(trained, make_task(metric=scripted(values[:3] + [0.2] * 3)), Context(1))
    assert result.facts["stopped_early"] and len(result.history) == 4 and result.facts["kept_epoch"] == 3


def test_a_gathered_score_prunes_once_after_half_of_the_training(trained):
    companion = Course(GradualSparsity(Prune(0.8, score=Movement()), start=0.5, end=0.5, updates=1))
    training(companion=companion).run(trained, make_task(), Context(1))
    assert companion.course == [0] * 24 + [sum(at(0.8).values())] * 26


def test_masked_weights_are_scored_by_their_gradient_and_not_trained_by_it(trained):
    task = make_task()
    model = Prune(0.5).run(trained, task).model.train()
    companion = GradualSparsity(Prune(0.5, score=Movement(), regrow=True))
    companion.begin(model, task)
    x, y = next(iter(task.train))
    nn.functional.cross_entropy(model(x), y).backward()
    companion.after_backward(Moment(model, task, torch.optim.SGD(model.parameters()), 1, 10))
    for place, mask in standing_masks(model):
        assert mask.gathered[~mask.keep].any()
        assert not stored_at(model, place).grad[~mask.keep].any()


def test_drop_and_grow_exchanges_the_smallest_for_those_with_the_largest_gradient():
    weight = torch.tensor([5.0, -1.0, 2.0, 0.5, 9.0, 9.0, 9.0, 9.0])
    keep = torch.tensor([True, True, True, True, False, False, False, False])
    gradient = torch.tensor([9.0, 0.1, 9.0, 7.0, -8.0, 0.2, 3.0, 0.3])
    found = exchanged(weight, gradient, keep, 0.5)  # 0.5 and −1 go; −8 comes, and of 7 and 3 what just went
    assert found.tolist() == [True, False, True, True, True, False, False, False]
    assert torch.equal(exchanged(weight, gradient, keep, 0.2), keep) and exchanged(weight, None, keep, 0.9) is not keep


def test_drop_and_grow_keeps_the_count_moves_masks_and_starts_what_came_at_zero(trained):
    sparse = Prune(0.8).run(trained, make_task()).model
    companion = DropAndGrow(fraction=0.5, end=0.6, updates=3)  # after 10, 20 and (none) 30 of 50 steps
    moved, began = [], []

    class Watching(Course):
        def after_backward(self, moment):
            before = {place: mask.keep.clone() for place, mask in standing_masks(moment.model)}
            self.other.after_backward(moment)
            for place, mask in standing_masks(moment.model):
                new = mask.keep & ~before[place]
                stored = moment.model.get_submodule(place.module).parametrizations.weight.original
                moved.append((moment.done, int(new.sum())))
                momentum = (moment.optimizer.state.get(stored) or {}).get("momentum_buffer")
                if new.any():
                    began.append(bool((stored[new] == 0).all() and (momentum[new] == 0).all()))
                assert (stored.grad[~mask.keep] == 0).all()

    watching = Watching(companion)
    result = training(companion=watching).run(sparse, make_task(), Context(1))
    assert set(watching.course) == {sum(at(0.8).values())} and zeros(result.model) == at(0.8)
    assert {done for done, count in moved if count} == {10, 20} and began and all(began)
    assert all(not mask.dense_gradient for _, mask in standing_masks(result.model))


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Block(4, 1), Block(1, 2), Rows("outputs"), Rows("inputs")])
def test_masks_of_a_pattern_are_not_exchanged_number_by_number(pattern):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 8))
    prune = Prune(None if isinstance(pattern, NM) else 0.5, pattern=pattern)
    with pytest.raises(InputError, match=r"would break the mask's pattern"):
        DropAndGrow().begin(prune.run(model, make_task()).model, make_task())
    with pytest.raises(InputError, match="single numbers"):
        train_sparse(pattern.sparsity or 0.5, prune=prune)
    for seed in range(3):
        sparse = Prune(0.5, score=RandomWeights(seed)).run(model, make_task()).model
        DropAndGrow().begin(sparse, make_task())


def test_a_gradual_pruning_says_what_it_passes_over_and_refuses_to_do_nothing(trained):
    step = prune_gradually(training=training(1), prune=Prune(pattern=NM(2, 4)))
    plan = step.run(trained, make_task(), Context(1)).plans[-1]
    assert [edit.place.module for edit in plan.edits] == ["4"]
    assert "6 inputs are no multiple of 4: 6 = 1 × 4 + 2" in [skip.reason for skip in plan.skips]
    step = prune_gradually(training=training(1), prune=Prune(pattern=NM(2, 5)))
    with pytest.raises(InputError, match=r"no weight may be masked.*no multiple of 5"):
        step.run(trained, make_task(), Context(1))


def test_a_sparse_training_without_masks_is_an_error(trained):
    with pytest.raises(InputError, match="no mask stands"):
        training(companion=DropAndGrow()).run(trained, make_task(), Context(1))


@pytest.mark.parametrize("count", [9, 11])
def test_a_loader_whose_length_is_wrong_or_unknown_is_an_error_with_a_companion(trained, count):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(6), 0)] * 8 * count)

    class Says(DataLoader):
        def __len__(self):
            return 10

    step = prune_gradually(0.5, training=training(1))
    with pytest.raises(InputError, match="must know how long"):
        step.run(trained, make_task(train=DataLoader(Stream(), 8)), Context(1))
    with pytest.raises(InputError, match=f"another number of batches.*{count} batches; expected 10"):
        step.run(trained, make_task(train=Says(Stream(), 8)), Context(1))


def test_each_round_takes_the_same_part_of_what_remains(trained):
    pipeline = prune_in_rounds(3, 0.9, recovery=training(2), prune=Prune(scope=ErdosRenyi()))
    kinds = [type(step).__name__ for step in pipeline.steps]
    assert kinds == ["Prune", "Finetune"] * 3
    left = [1 - step.sparsity for step in pipeline.steps[::2]]
    assert left == pytest.approx([0.1 ** (1 / 3), 0.1 ** (2 / 3), 0.1]) and left[-1] == 1 - 0.9
    result = pipeline.run(trained, make_task(), Context(1))
    assert sum(zeros(result.model).values()) == math.floor(0.9 * 144)
    by_type = prune_in_rounds(2, recovery=training(1), prune=Prune(scope=PerType(linear=0.8)))
    assert [step.scope.linear for step in by_type.steps[::2]] == [0.4, 0.8]
    with pytest.raises(InputError, match="rounds: too few"):
        prune_in_rounds(0, 0.9, recovery=training(1))


def test_a_schedule_takes_the_sparsity_of_its_prune_and_refuses_two():
    assert prune_gradually(prune=Prune(0.83)).companion.prune.sparsity == 0.83
    rounds = prune_in_rounds(2, recovery=training(1), prune=Prune({"0": 0.9}))
    assert rounds.steps[-2].sparsity == {"0": 0.9} and train_sparse(0.7, prune=Prune(0.7)).steps[0].sparsity == 0.7
    for make in (
        lambda: prune_gradually(0.8, prune=Prune(0.9)), lambda: train_sparse(0.8, prune=Prune(0.9)),
        lambda: prune_in_rounds(2, 0.8, recovery=training(1), prune=Prune(0.9)),
        lambda: dense_sparse_dense(0.8, prune=Prune(0.9)), lambda: LotteryTicket(0.8, prune=Prune(0.9)),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"two sparsities are asked for. Got 0.8, and 0.9 in prune"):
            make()


def test_dense_sparse_dense_ends_dense(trained):
    result = dense_sparse_dense(0.5, sparse=training(2), dense=training(2)).run(trained, make_task(), Context(1))
    assert zeros(result.model) == {"0": 0, "4": 0}
    assert [plan.method for plan in result.plans] == ["prune", "unmask"]


def test_a_ticket_goes_back_to_the_initialisation_and_its_training_is_the_masked_one():
    task = make_task()
    whole = training(3)
    result = LotteryTicket(0.75, rounds=2, training=whole).run(task.model, task, Context(4))
    assert zeros(result.model) == at(0.75) and len(result.history) == 9
    # By hand: the last masks on the initial weights, trained as the last training was.
    again = whole.run(apply(task.model, result.plans[0]), task, Context(4).part(5, "Finetune"))
    assert same(state(result.model), state(again.model))


def test_rewinding_to_an_epoch_starts_every_round_there():
    task, begun = make_task(), []

    class Listening(Progress):
        def track(self, items, description, total=None):
            begun.append(description)
            yield from items

    whole = training(4)
    result = LotteryTicket(0.5, rounds=1, training=whole, rewind=1).run(task.model, task, Context(4, None, Listening()))
    assert [text for text in begun if text.startswith("training")] == [
        "training, 1 epochs", "training, 3 epochs", "training, 3 epochs"
    ]  # fmt: skip
    assert zeros(result.model) == at(0.5)
    # A ticket that keeps everything is the dense training, restarted at the epoch.
    dense = LotteryTicket(0.0, rounds=1, training=whole, rewind=1).run(task.model, task, Context(4))
    early = first_epochs(whole, 1).run(task.model, task, Context(4).part(0, "Early"))
    late = last_epochs(whole, 3).run(early.model, task, Context(4).part(3, "Finetune"))
    assert same(state(dense.model), state(late.model))


def test_a_fresh_initialisation_depends_on_the_seed_alone(trained):
    one, again, other = (reinitialised(trained, seed) for seed in (1, 1, 2))
    assert same(state(one), state(again)) and not same(state(one), state(other))
    assert not torch.equal(one[0].weight, trained[0].weight)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

    with pytest.raises(InputError, match="own: its initialisation is not known"):
        reinitialised(nn.ModuleDict({"own": Own()}), 0)


def test_a_part_of_a_schedule_has_the_whole_s_factors():
    for whole in (Cosine(), OneCycle()):
        factors = [whole.factor(step, 40) for step in range(40)]
        last = Part(whole, 0.75, 1.0)
        assert [last.factor(step, 10) for step in range(10)] == factors[30:]
        first = Part(whole, 0.0, 0.25)
        assert [first.factor(step, 10) for step in range(10)] == factors[:10]
    with pytest.raises(InputError, match="begin < end"):
        Part(Constant(), 0.5, 0.5)


def test_learning_rate_rewinding_retrains_with_the_rates_of_the_last_epochs(trained):
    whole = training(4)
    pipeline = rewind_learning_rate(2, 0.5, training=whole, epochs=2)
    result = pipeline.run(trained, make_task(), Context(1))
    rates = [entry["lr"] for entry in result.history]
    expected = [0.03 * Cosine().factor(10 * epoch - 1, 40) for epoch in (3, 4)]
    assert rates == pytest.approx(expected * 2) and zeros(result.model) == at(0.5)
    with pytest.raises(InputError, match="no such part"):
        rewind_learning_rate(2, 0.5, training=whole, epochs=5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GradualSparsity(start=0.8, end=0.5),
        lambda: GradualSparsity(end=0.0),
        lambda: GradualSparsity(end=1.5),
        lambda: GradualSparsity(updates=0),
        lambda: DropAndGrow(fraction=0),
        lambda: DropAndGrow(end=1.1),
        lambda: DropAndGrow(updates=0),
        lambda: LotteryTicket(rewind=10),
        lambda: LotteryTicket(initial="random"),
        lambda: LotteryTicket(sparsity=1.0),
        lambda: LotteryTicket(rounds=0),
    ],
)
def test_settings_out_of_range_are_errors(make):
    with pytest.raises(InputError):
        make()


def test_random_weights_at_the_start_are_what_the_paper_grows_from():
    task = make_task()
    step = train_sparse(0.7, training=training(3), prune=Prune(score=RandomWeights(), scope=ErdosRenyi()))
    result = step.run(task.model, task, Context(1))
    assert sum(zeros(result.model).values()) == math.floor(0.7 * 144 + 1e-9)
