import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from tersor.core.errors import ArtifactError, InputError, TrainingError
from tersor.core.keyed import Keyed
from tersor.core.progress import Progress
from tersor.core.step import Context, Every
from tersor.core.task import Task
from tersor.train import checkpoint
from tersor.train.finetune import Finetune
from tersor.train.midway import mark_of
from tersor.train.optimizer import Optimizer

MOMENTS = {  # when killed -> after which epoch, and which batch of which epoch, it must go on
    "first epoch": None,
    "second epoch, first batch": 1,
    "third epoch": 2,
    "inside the first epoch": (None, 3, 1),
    "inside the third epoch": (2, 3, 3),
    "inside two epochs": (3, 3, 4),
    "before the checkpoint is renamed": 1,
    "before old checkpoints are removed": 3,
    "in the middle of a file": 1,
    "after the last epoch": 4,
}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    program = Path(__file__).with_name("killed_training.py")
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("kind", ["plain", "edited"])
def test_a_killed_training_ends_with_the_same_weights(killed, kind, moment):
    whole, resumed = killed[kind]["uninterrupted"], killed[kind][moment]
    assert resumed["killed"]
    after, *inside = MOMENTS[moment] if isinstance(MOMENTS[moment], tuple) else (MOMENTS[moment],)
    said = [] if after is None else [f"going on after epoch {after}/4"]
    told = [text for text in resumed["said"] if not text.startswith("warning: The temperature")]
    assert told == said + (["going on after batch {} of epoch {}".format(*inside)] if inside else [])
    assert resumed["weights"] == whole["weights"]
    assert resumed["history"] == whole["history"]
    assert resumed["facts"] == whole["facts"]
    assert resumed["left"][-1] == "epoch-0004" and set(resumed["left"]) <= {"epoch-0003", "epoch-0004"}


def test_the_killed_trainings_hand_back_an_earlier_epoch_somewhere(killed):
    assert any(killed[kind]["uninterrupted"]["facts"]["kept_epoch"] < 4 for kind in killed)


class Listening(Progress):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


STEP = Finetune(epochs=4, optimizer=Optimizer(lr=0.01))


def make_task():
    torch.manual_seed(0)
    batches = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(3)]
    return Task(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), batches, batches, batches).complete()


def train(folder, step=STEP, seed=1):
    task, progress = make_task(), Listening()
    result = step.run(task.model, task, Context(seed, folder, progress))
    return {name: tensor.clone() for name, tensor in result.model.state_dict().items()}, progress.said


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def other_number(path):
    path.write_text(path.read_text().replace('"halved": false', '"halved": true'))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", cut_in_half), ("state.safetensors", flip_a_bit), ("state.safetensors", Path.unlink),
        ("state.json", cut_in_half), ("state.json", other_number), ("state.json", Path.unlink),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(tmp_path, name, damage):
    whole, _ = train(tmp_path)
    damage(tmp_path / "checkpoint" / "epoch-0004" / name)
    again, said = train(tmp_path)
    assert len(said) == 2 and "epoch-0004 is not used" in said[0] and said[1] == "going on after epoch 3/4"
    assert same(again, whole)
    assert train(tmp_path)[1] == ["going on after epoch 4/4"]  # and was written anew


def test_with_every_checkpoint_damaged_training_starts_afresh(tmp_path):
    whole, _ = train(tmp_path)
    for path in tmp_path.rglob("state.safetensors"):
        cut_in_half(path)
    again, said = train(tmp_path)
    assert len(said) == 2 and all("not used" in text for text in said)
    assert same(again, whole)


@pytest.mark.parametrize("other", ["seed", "settings", "model"])
def test_checkpoints_of_another_training_are_said_and_not_used(tmp_path, other, monkeypatch):
    if other == "model":
        with monkeypatch.context() as patch:
            patch.setattr(torch, "manual_seed", lambda seed: torch.random.default_generator.manual_seed(seed + 1))
            train(tmp_path)
    else:
        train(tmp_path, Finetune(epochs=5) if other == "settings" else STEP, seed=2 if other == "seed" else 1)
    again, said = train(tmp_path)
    assert said and all("another model" in text for text in said)
    assert same(again, train(None)[0])
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["epoch-0003", "epoch-0004"]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    train(tmp_path)
    files = [path for path in (tmp_path / "checkpoint").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"state.safetensors", "state.json"}
    for path in files:
        assert json.loads(path.read_bytes()) if path.suffix == ".json" else load(path.read_bytes())


def test_a_full_disk_is_an_error_that_keeps_finished_epochs(tmp_path, monkeypatch):
    real = checkpoint.write_atomically

    def full(path, data):
        if "epoch-0003" in str(path):
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(ArtifactError, match="No space left"):
        train(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == ["epoch-0001", "epoch-0002"]
    monkeypatch.undo()
    resumed, said = train(tmp_path)
    assert said == ["going on after epoch 2/4"]
    assert same(resumed, train(None)[0])


class Secretive(nn.Linear):
    def get_extra_state(self):
        return "words"

    def set_extra_state(self, state):
        pass


def test_a_model_with_state_that_is_no_tensor_is_trained_without_checkpoints_and_that_is_said(tmp_path):
    task, progress = make_task(), Listening()
    STEP.run(nn.Sequential(Secretive(5, 3)), task, Context(0, tmp_path, progress))
    assert any("no checkpoints: 0 keep state" in text for text in progress.said)
    assert not (tmp_path / "checkpoint").exists()


class Stopped(Exception):
    pass


class Unsteady:
    """Batches whose order is drawn batch by batch from the generator that dropout draws from too."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        left = list(self.batches)
        while left:
            yield left.pop(int(torch.randint(len(left), ())))

    def __len__(self):
        return len(self.batches)


def stopping_task(at, kind):
    torch.manual_seed(0)
    batches = [(torch.randn(8, 5), torch.randint(0, 3, (8,))) for _ in range(12)]
    calls = iter(range(10**6))

    def loss(model, batch):
        if model.training and next(calls) == at:
            raise Stopped
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    return Task(model, kind(batches), batches, batches, batches, loss=loss).complete()


@pytest.mark.parametrize("kind", [list, Unsteady])
def test_an_epoch_goes_on_inside_only_where_the_loader_gives_the_same_batches_again(tmp_path, kind):
    step = Finetune(epochs=2, optimizer=Optimizer(lr=0.1))
    context = Context(1, tmp_path, Listening(), Every(batches=4))
    whole = stopping_task(None, kind)
    expected = step.run(whole.model, whole, Context(1)).model.state_dict()
    task = stopping_task(12 + 10, kind)
    with pytest.raises(TrainingError):
        step.run(task.model, task, context)
    assert (tmp_path / "checkpoint" / "epoch-0001-batch-000008").is_dir()
    task = stopping_task(None, kind)
    context.progress.said.clear()
    result = step.run(task.model, task, context)
    said = context.progress.said
    assert said[:2] == ["going on after epoch 1/2", "going on after batch 8 of epoch 2"]
    assert ("does not give the same batches" in said[-1]) == (kind is Unsteady) and len(said) == 2 + (kind is Unsteady)
    assert same(result.model.state_dict(), expected)


def test_a_damaged_checkpoint_inside_an_epoch_is_said_and_the_epoch_begun_again(tmp_path):
    step, context = Finetune(epochs=2), Context(1, tmp_path, Listening(), Every(batches=4))
    task = stopping_task(10, list)
    with pytest.raises(TrainingError):
        step.run(task.model, task, context)
    cut_in_half(tmp_path / "checkpoint" / "epoch-0000-batch-000008" / "state.safetensors")
    task = stopping_task(None, list)
    again = step.run(task.model, task, context).model.state_dict()
    assert len(context.progress.said) == 1 and "not used" in context.progress.said[0]
    task = stopping_task(None, list)
    assert same(again, step.run(task.model, task, Context(1)).model.state_dict())


@pytest.mark.parametrize("targets_of", [None, lambda batch: None])
def test_batches_without_labels_are_told_apart_by_what_they_hold(targets_of):
    task = Task(nn.Linear(2, 1), targets_of=targets_of)
    first, second = ({"x": torch.full((3, 2), value)} for value in (1.0, 2.0))
    assert mark_of(first, task) == mark_of(Keyed(first, torch.zeros(0)), task) != mark_of(second, task)


@pytest.mark.parametrize("fields", [{"batches": 0}, {"minutes": -1.0}])
def test_intervals_of_checkpoints_are_positive(fields):
    with pytest.raises(InputError, match="Every"):
        Every(**fields)
