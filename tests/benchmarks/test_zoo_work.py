"""A worker's stages on small models, the limits around them, and the models that the zoo has."""

import importlib.util
import json
import time

import pytest
import torch
from torch import nn

from benchmarks.zoo import worker
from benchmarks.zoo.catalogue import Entry, catalogue, entry, matching, pixels, tokens
from benchmarks.zoo.limits import OverBudget, budget, unbudgeted, watched
from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.stages import Notes, StageError, capture_apart, read_notes
from benchmarks.zoo.verdict import OK, verdict
from tersor.graph.trace import trace


class Small(nn.Module):
    """Convolutions with a residual, a layer scale of zero and running statistics."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1))
        self.scale = nn.Parameter(torch.zeros(16, 1, 1))
        self.head = nn.Linear(16, 7)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.scale * self.body(x)).mean((2, 3)))


SMALL = Entry("small", "small", Small, pixels(8))


def work(tmp_path, given=SMALL, **options):
    notes = Notes(tmp_path / "notes.jsonl")
    try:
        worker.work(given, notes, **{"limit": 60.0, "onnx": False} | options)
    except StageError:
        pass
    return read_notes(tmp_path / "notes.jsonl")


def test_a_model_that_prunes_well_is_done(tmp_path):
    facts = work(tmp_path)
    assert verdict(facts) == OK
    assert facts["stage"] == "done" and facts["groups"] == 2 and facts["inputs"] == ["2×3×8×8"]
    assert 0.2 < facts["macs_left"] < 0.45 and facts["captures"] == 1 and facts["capture_s"] > 0
    assert facts["parameters"] == sum(p.numel() for p in Small().parameters())


def test_a_removal_that_changes_the_output_is_called_wrong(tmp_path, monkeypatch):
    def wrong(model, plan):
        edited = original(model, plan)
        with torch.no_grad():
            edited.head.weight.copy_(edited.head.weight.roll(1, dims=1))  # the channels kept, in another order
        return edited

    original = worker.apply
    monkeypatch.setattr(worker, "apply", wrong)
    assert verdict(work(tmp_path)).startswith("wrong: differs from the masked model by")


def test_a_model_that_cannot_be_captured_says_so_and_nothing_else_is_tried(tmp_path):
    class Branches(Small):
        def forward(self, x):
            return super().forward(x) if x.sum() > 1e9 else super().forward(x)

    facts = work(tmp_path, Entry("small", "branches", Branches, pixels(8)))
    assert verdict(facts).startswith("plan: GraphError:") and "macs_left" not in facts


def test_a_model_that_does_not_train_is_not_done(tmp_path):
    class Stubborn(Small):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("not in training")
            return super().forward(x)

    facts = work(tmp_path, Entry("small", "stubborn", Stubborn, pixels(8)))
    assert verdict(facts) == "train: RuntimeError: not in training"
    assert facts["reloads"] is True


def test_planning_over_its_budget_is_stopped_and_noted(tmp_path, monkeypatch):
    def slow(self, model, task):
        while True:
            try:
                time.process_time()
            except Exception:
                continue

    monkeypatch.setattr(worker.PruneChannels, "plan", slow)
    assert verdict(work(tmp_path, limit=0.2)) == "plan: OverBudget: more than 0.2 s"


def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_budget_counts_computing_and_not_what_stands_outside_it():
    with budget(0.2):
        time.sleep(0.3)
        with unbudgeted():
            burn(0.3)
    with pytest.raises(OverBudget), budget(0.2):
        burn(2.0)
    burn(0.3)  # nothing goes off afterwards


def test_capture_is_timed_apart_and_left_as_it_was():
    export = torch.export.export
    with capture_apart() as spent:
        trace(Small().eval(), pixels(8)())
    assert len(spent) == 2 and min(spent) > 0
    assert torch.export.export is export


def test_notes_of_a_killed_process_are_what_it_had_written(tmp_path):
    notes = Notes(tmp_path / "notes.jsonl")
    notes.add(macs=3)
    with pytest.raises(StageError), notes.stage("plan"):
        raise ValueError("two\nlines")
    with notes.path.open("a") as file:
        file.write('{"difference": 1e-')
    assert read_notes(notes.path) == {"macs": 3, "stage": "plan", "error_plan": "ValueError: two lines"}


@pytest.mark.parametrize(
    "options, stopped",
    [
        ({"gib": 0.001}, "more than 0.001 GiB"),
        ({"seconds": 0.3}, "more than 0.3 s in all"),
        ({"cancelled": lambda: True}, "cancelled"),
    ],
)
def test_a_process_over_its_limits_is_ended(options, stopped):
    outcome = watched(
        "timeit", ["-n1", "-r1", "import time; time.sleep(30)"], **{"seconds": 30.0, "gib": 1.0} | options
    )
    assert outcome.stopped == stopped and outcome.seconds < 10


def test_a_process_that_fails_says_its_last_words():
    assert "no_such_module" in watched("no_such_module", [], seconds=30, gib=1).stopped
    assert watched("timeit", ["-n1", "-r1"], seconds=30, gib=1).stopped is None


def test_randomising_leaves_no_parameter_constant_and_all_outputs_finite():
    torch.manual_seed(0)
    model, (x,) = Small(), pixels(8)()
    before = model.head.weight.clone()
    randomise(model, (x,), seed=1)
    assert all(p.std() > 1e-3 for p in model.parameters())
    wanted = 16**-0.5  # what was random stays, but is no weaker than this
    assert torch.allclose(model.head.weight, before * wanted / before.std()) and before.std() < wanted
    assert not model.training and bool(torch.isfinite(model(x)).all())
    assert model.stem[1].running_var.std() > 0 and model.stem[1].running_var.min() > 0


def test_randomising_is_repeatable():
    def state():
        torch.manual_seed(0)
        model = Small()
        randomise(model, pixels(8)(), seed=1)
        return model.state_dict()

    first, second = state(), state()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_patterns_choose_by_name_and_by_suite():
    entries = [Entry("timm", "swin_tiny", Small, pixels(8)), Entry("transformers", "swin", Small, pixels(8))]
    assert matching(entries, ["swin*"]) == tuple(entries)
    assert matching(entries, ["timm/*"]) == (entries[0],)
    assert matching(entries, []) == tuple(entries)
    with pytest.raises(LookupError, match="resnet"):
        matching(entries, ["swin*", "resnet*"])


def test_example_inputs_are_the_same_each_time():
    ids, mask = tokens(211, masks=1)()
    assert torch.equal(ids, tokens(211, masks=1)()[0]) and ids.shape == mask.shape == (3, 13)
    assert bool((mask == 1).all()) and 5 <= int(ids.min()) and int(ids.max()) < 211


def installed(library):
    return pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"{library} is not installed")


@installed("torchvision")
def test_torchvision_has_seventy_five_classifiers_up_to_150_million_parameters():
    from benchmarks.zoo.torchvision_models import SIZES

    names = [found.name for found in catalogue(["torchvision"])]
    assert len(names) == len(set(names)) == 75
    assert {"resnet18", "vgg19_bn", "densenet201", "maxvit_t"} <= set(names) and "vit_l_16" not in names
    assert set(SIZES) <= set(names)


@installed("timm")
def test_timm_has_forty_models_and_more_of_all_families():
    import timm

    from benchmarks.zoo.timm_models import FAMILIES

    entries = catalogue(["timm"])
    assert len(entries) >= 40 and min(len(models) for models in FAMILIES.values()) >= 5
    assert {found.name for found in entries} <= set(timm.list_models())


@installed("transformers")
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_transformers_models_are_built_as_their_configuration_says(name):
    assert len(catalogue(["transformers"])) >= 16
    found = entry(f"transformers/{name}")
    model, inputs = worker.built(found, 0)
    assert len({p.dtype for p in model.parameters()}) == 1 and next(model.parameters()).dtype == torch.float64
    assert model(*inputs).logits.shape[0] == inputs[0].shape[0]


def test_notes_are_plain_json(tmp_path):
    notes = Notes(tmp_path / "notes.jsonl")
    notes.add(difference=1e-12, trains=True)
    assert json.loads(notes.path.read_text()) == {"difference": 1e-12, "trains": True}
