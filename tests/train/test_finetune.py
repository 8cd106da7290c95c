import copy
import io
import itertools
import random
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tersor.core.apply import apply
from tersor.core.edit import Mask, Quantizer
from tersor.core.errors import InputError, TrainingError
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Context
from tersor.core.task import Metric, Task
from tersor.distill.response import Distill
from tersor.report.progress import RichProgress
from tersor.train import finetune
from tersor.train.finetune import Finetune, estimate
from tersor.train.optimizer import Optimizer
from tersor.train.schedules import Constant, Cosine


class Listening(Progress):
    def __init__(self):
        self.said, self.tracked, self.running = [], [], 0

    def say(self, text):
        self.said.append(text)

    def track(self, items, description, total=None):
        self.tracked.append((description, total))
        self.running += 1
        try:
            yield from items
        finally:
            self.running -= 1


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def make_task(**fields):
    """Three classes that a linear function tells apart."""
    torch.manual_seed(0)
    x = torch.randn(240, 6)
    data = TensorDataset(x, (x @ torch.randn(6, 3)).argmax(1))
    train, held_out = (torch.utils.data.Subset(data, list(part)) for part in (range(160), range(160, 240)))
    loaders = {"train": DataLoader(train, 16, shuffle=True), "validation": DataLoader(held_out, 40)}
    return Task(**{"model": network(), **loaders, "test": loaders["validation"], **fields}).complete()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(step, task, context=None):
    return step.run(task.model, task, context or Context(3))


def test_training_lowers_the_loss_and_tells_each_epoch():
    task, progress = make_task(), Listening()
    result = run(Finetune(epochs=6), task, Context(3, None, progress))
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3, 4, 5, 6]
    assert all(entry.keys() == {"epoch", "loss", "validation", "lr", "seconds"} for entry in result.history)
    assert result.history[-1]["loss"] < 0.6 * result.history[0]["loss"]
    assert result.history[-1]["validation"] > 0.85
    epochs = [(f"epoch {epoch}/6", 10) for epoch in range(1, 7)]
    assert progress.tracked == [("training, 6 epochs", 60), *epochs] and progress.running == 0
    rates = [entry["lr"] for entry in result.history]
    assert rates == pytest.approx([0.05 * Cosine().factor(10 * epoch - 1, 60) for epoch in range(1, 7)])


def test_the_model_given_and_the_random_state_stay_as_they_were():
    task = make_task()
    task.model.train()
    before = state(task.model)
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    result = run(Finetune(epochs=1), task)
    assert same(state(task.model), before) and task.model.training
    assert not same(state(result.model), before)
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_comes_back_plain_and_exportable(precision, monkeypatch):
    monkeypatch.setattr(finetune, "multiplies_bf16", lambda device: True)
    task = make_task()
    task.model[0].requires_grad_(False)
    model = run(Finetune(epochs=2, precision=precision), task).model
    assert type(model) is nn.Sequential and model.__dict__.keys() == network().__dict__.keys()
    assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
    assert torch.equal(model[0].weight, task.model[0].weight)
    assert all(p.dtype == torch.float32 and p.grad is None for p in model.parameters())
    x = torch.randn(4, 6)
    exported = torch.export.export(copy.deepcopy(model), (x,)).module()
    assert torch.allclose(exported(x), model(x)) and model(x).dtype == torch.float32


def test_bf16_learns_too_and_differs_from_fp32(monkeypatch):
    monkeypatch.setattr(finetune, "multiplies_bf16", lambda device: True)
    half, full = (run(Finetune(epochs=4, precision=precision), make_task()) for precision in ("bf16", "fp32"))
    assert half.history[-1]["loss"] < 0.7 * half.history[0]["loss"]
    assert half.history[0]["loss"] != full.history[0]["loss"]
    assert half.facts["precision"] == "bf16"


def test_a_processor_without_bf16_trains_in_fp32_and_says_so(monkeypatch):
    monkeypatch.setattr(finetune, "multiplies_bf16", lambda device: False)
    progress = Listening()
    result = run(Finetune(epochs=1, precision="bf16"), make_task(), Context(3, None, progress))
    assert result.facts["precision"] == "fp32" and any("float32 instead" in text for text in progress.said)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    weights = [state(run(Finetune(epochs=2), make_task(), Context(seed)).model) for seed in (1, 1, 2)]
    assert same(weights[0], weights[1]) and not same(weights[0], weights[2])


def scripted(values):
    """A metric whose value after epoch n is values[n − 1], whatever the model does (two validation batches each)."""
    turns = iter([value for value in values for _ in range(2)])
    return Metric("scripted", lambda outputs, targets: torch.full((len(outputs),), next(turns)))


@pytest.mark.parametrize(("higher", "sign"), [(True, 1.0), (False, -1.0)])
def test_the_best_epoch_is_kept_and_patience_stops_training(higher, sign):
    values = [sign * value for value in (0.25, 0.5, 0.375, 0.125, 0.75)]
    metric = scripted(values)
    metric = Metric("scripted", metric.per_sample, higher_is_better=higher, unit="points")
    step = Finetune(epochs=5, schedule=Constant(), patience=2)
    result = run(step, make_task(metric=metric))
    assert [entry["validation"] for entry in result.history] == values[:4]
    assert result.facts["kept_epoch"] == 2 and result.facts["stopped_early"]
    second = run(Finetune(epochs=2, schedule=Constant(), keep="last"), make_task())
    assert same(state(result.model), state(second.model))


def test_of_equal_epochs_the_last_is_kept_but_does_not_count_as_progress():
    result = run(Finetune(epochs=5, patience=2), make_task(metric=scripted([0.5] * 5)))
    assert result.facts["kept_epoch"] == 3 and len(result.history) == 3


def test_keep_last_keeps_the_last():
    result = run(Finetune(epochs=3, keep="last"), make_task(metric=scripted([0.5, 0.25, 0.125])))
    assert result.facts["kept_epoch"] == 3


def test_the_gradient_is_clipped():
    task = make_task()
    step = Finetune(epochs=1, optimizer=Optimizer(lr=1.0, momentum=0, weight_decay=0), schedule=Constant(), clip=1e-6)
    moved = run(step, task).model[4].weight - task.model[4].weight
    assert 0 < moved.norm() < 2e-5  # ten steps of at most 1e-6


def spoiled(at, loss=lambda outputs: outputs.mean() * float("nan")):
    """A loss that is NaN at the given calls (from 0)."""
    calls = itertools.count()

    def function(model, batch):
        outputs = model(batch[0])
        good = nn.functional.cross_entropy(outputs, batch[1])
        return good + loss(outputs) if next(calls) in at else good

    return function


def test_a_loss_that_turns_nan_goes_back_once_with_half_the_learning_rate():
    progress = Listening()
    result = run(Finetune(epochs=3), make_task(loss=spoiled({14})), Context(3, None, progress))
    assert progress.said == [
        "epoch 2, batch 4: the loss is not finite; back to the end of epoch 1 with half the learning rate"
    ]
    assert [entry["epoch"] for entry in result.history] == [1, 2, 3] and result.facts["learning_rate_halved"]
    assert result.history[1]["lr"] == pytest.approx(0.025 * Cosine().factor(19, 30))
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_a_second_nan_is_an_error_that_says_where():
    with pytest.raises(TrainingError, match="epoch 1, batch 0: the loss is not finite, again"):
        run(Finetune(epochs=3), make_task(loss=spoiled({2, 10})))


def test_nan_in_the_gradient_of_the_last_batch_is_seen_too():
    root_of_zero = spoiled({9}, loss=lambda outputs: (outputs * 0).sum().sqrt())
    progress = Listening()
    run(Finetune(epochs=1), make_task(loss=root_of_zero), Context(3, None, progress))
    assert progress.said == [
        "epoch 1: a weight or statistic is not finite; back to the start with half the learning rate"
    ]


def test_nan_is_noticed_long_before_the_end_of_an_epoch():
    pulled = []

    class Endless(IterableDataset):
        def __iter__(self):
            for number in range(1000):
                pulled.append(number)
                yield torch.full((6,), float("nan")), torch.tensor(0)

    with pytest.raises(TrainingError):
        run(Finetune(epochs=1), make_task(train=DataLoader(Endless(), 4), calibration=make_task().train))
    assert len(pulled) == 2 * 64 * 4  # samples, in the two attempts


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), AssertionError("boom"), OSError("boom")])
def test_whatever_a_batch_raises_is_told_with_epoch_and_batch(error):
    calls = itertools.count()

    def explode(model, batch):
        if next(calls) == 13:
            raise error
        return model(batch[0]).sum()

    progress = Listening()
    with pytest.raises(TrainingError) as caught:
        run(Finetune(), make_task(loss=explode), Context(3, None, progress))
    assert caught.value.where == "epoch 2/5, batch 3" and "boom" in caught.value.got
    assert caught.value.got.startswith(type(error).__name__) and caught.value.__cause__ is error
    assert progress.running == 0  # no bar is left behind


def test_ctrl_c_passes_through():
    def interrupted(model, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Finetune(), make_task(loss=interrupted))


class Failing:
    """Good batches, but for one at one pass: a file that vanished in mid-run."""

    def __init__(self, batches, at, on_pass):
        self.batches, self.at, self.on_pass, self.passes = list(batches), at, on_pass, 0

    def __iter__(self):
        self.passes += 1
        for number, batch in enumerate(self.batches):
            if number == self.at and self.passes == self.on_pass:
                raise FileNotFoundError("image 17.png")
            yield batch


@pytest.mark.parametrize(
    "split, says",
    [("train", "epoch 2/3, task.train, batch 1"), ("validation", "epoch 2/3, task.validation, batch 1")],
)
def test_a_loader_that_fails_in_mid_run_is_named_with_its_epoch(split, says):
    task = make_task()
    failing = Failing(getattr(task, split), at=1, on_pass=2)
    with pytest.raises(InputError, match=f"{says}: the loader fails. Got FileNotFoundError: image 17.png"):
        run(Finetune(epochs=3), make_task(**{split: failing}, calibration=task.train))


def test_a_forward_that_fails_in_validation_names_its_batch():
    short = [(torch.randn(8, 5), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(InputError, match="epoch 1/5, task.validation, batch 0: the model does not run on this batch"):
        run(Finetune(), make_task(validation=short))


def test_sparse_output_tells_of_the_whole_training():
    now = itertools.count()
    seconds = [0]

    def slow(model, batch):
        seconds[0] = next(now)
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    paper = Console(file=io.StringIO(), force_terminal=False, width=80)
    progress = RichProgress(paper, every=15, clock=lambda: float(seconds[0]))
    run(Finetune(epochs=8), make_task(loss=slow), Context(3, None, progress))
    lines = paper.file.getvalue().splitlines()
    assert lines[0] == "  training, 8 epochs: 16 of 80, about 1 min 0 s left"
    assert len(lines) == 5 and all(line.startswith("  training, 8 epochs: ") for line in lines)


class Nothing(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("loader", [[], DataLoader(Nothing())])
def test_an_empty_train_loader_is_an_error(loader):
    task = make_task()
    with pytest.raises(InputError, match="task.train: the loader is empty"):
        run(Finetune(), make_task(train=loader, calibration=task.train))


def test_a_loader_without_a_length_moves_the_learning_rate_by_epochs():
    class Stream(IterableDataset):
        def __iter__(self):
            torch.manual_seed(0)
            yield from zip(torch.randn(32, 6), torch.randint(0, 3, (32,)), strict=True)

    progress = Listening()
    result = run(Finetune(epochs=3), make_task(train=DataLoader(Stream(), 8)), Context(3, None, progress))
    assert [entry["lr"] for entry in result.history] == [0.05 * Cosine().factor(epoch, 3) for epoch in range(3)]
    assert progress.tracked[:2] == [("training, 3 epochs", None), ("epoch 1/3", None)]


def test_masks_and_quantisers_train_unaided():
    task = make_task()
    weight = TensorPlace("0", "weight")
    keep = torch.rand(16, 6) < 0.5
    zero = torch.tensor(0, dtype=torch.int32)
    edits = (
        Mask(weight, keep),
        Quantizer((weight,), torch.full((16,), 0.02), torch.zeros(16, dtype=torch.int32), -128, 127, axis=0),
        Quantizer((ActivationPlace("2", "relu"),), torch.tensor(0.01), zero, 0, 255),
    )
    model = apply(task.model, Plan("by hand", edits))
    result = Finetune(epochs=5, objective=Distill(), optimizer=Optimizer("adamw", 0.02)).run(model, task, Context(3))
    trained = result.model
    assert (trained[0].weight[~keep] == 0).all() and (trained[0].weight[keep] != 0).float().mean() > 0.8
    assert not torch.allclose(trained[2].tersor_taps.taps["relu_0"].scale, torch.tensor(0.01))
    assert not torch.allclose(trained[0].parametrizations.weight[1].scale, torch.tensor(0.02))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert copy.deepcopy(trained)(torch.randn(2, 6)).shape == (2, 3)


def test_an_incomplete_task_is_completed():
    task = make_task()
    plain = Task(task.model, task.train, task.validation, task.test)
    assert same(state(run(Finetune(epochs=1), plain).model), state(run(Finetune(epochs=1), task).model))


def test_tensorboard_gets_the_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run(Finetune(epochs=2), make_task(), Context(3, tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    shown = [event.value for event in events.Scalars("validation/accuracy")]
    assert shown == pytest.approx([entry["validation"] for entry in result.history])


def test_without_tensorboard_nothing_is_written_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(Finetune(epochs=1), make_task(), Context(3, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_workers_that_live_on_are_said_to_void_exact_resumption(tmp_path):
    task, progress = make_task(), Listening()
    task = make_task(train=DataLoader(task.train.dataset, 80, num_workers=1, persistent_workers=True))
    run(Finetune(epochs=1), task, Context(3, tmp_path, progress))
    assert any("persistent_workers" in text for text in progress.said)


def test_an_estimate_names_the_batch_that_fails():
    def explode(model, batch):
        raise KeyError("boom")

    task = make_task(loss=explode)
    with pytest.raises(TrainingError, match="task.train, batch 0: a batch cannot be trained on. Got KeyError: 'boom'"):
        estimate(Finetune(), task.model, task)


def test_an_estimate_counts_what_a_slow_loader_costs_and_changes_nothing():
    task = make_task()

    class Slow:
        def __iter__(self):
            for batch in task.train:
                time.sleep(0.02)
                yield batch

        def __len__(self):
            return len(task.train)

    slow = make_task(train=Slow(), calibration=task.train)
    before, random_state = state(slow.model), torch.get_rng_state()
    seconds = estimate(Finetune(epochs=7, objective=Distill()), slow.model, slow)
    assert 7 * 10 * 0.02 < seconds < 7 * 10 * 0.02 * 20
    assert same(state(slow.model), before) and torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "fields",
    [{"epochs": 0}, {"precision": "fp8"}, {"keep": "first"}, {"patience": 0}, {"clip": 0.0}, {"clip": float("nan")}],
)
def test_settings_out_of_range_are_errors_that_name_the_field(fields):
    with pytest.raises(InputError, match=f"Finetune.{next(iter(fields))}"):
        Finetune(**fields)
