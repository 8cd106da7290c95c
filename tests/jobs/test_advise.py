import copy
import json
import math
import shutil
import time
from dataclasses import dataclass, replace

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tersor
from tersor.cli.main import main
from tersor.core.errors import ArtifactError, InputError, TersorError
from tersor.core.measurement import Measurement
from tersor.core.plan import Plan
from tersor.core.progress import Progress
from tersor.core.step import Result, Step
from tersor.hardware.advice import Line
from tersor.hardware.profile import read_profile, to_yaml
from tersor.hardware.roofline import Roofline
from tersor.jobs import advise as advise_module
from tersor.jobs import fits as fits_module
from tersor.jobs import try_out
from tersor.jobs.advise import advise
from tersor.jobs.candidates import Candidate, candidates
from tersor.jobs.fits import fits, task_workload
from tersor.jobs.trials import Trial, measured_lines, rank, verdict_of
from tersor.jobs.try_out import made
from tersor.recipes.recipe import parts_of, read_recipe


class Said(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def task():
    torch.manual_seed(0)
    x, y = torch.randn(90, 3, 8, 8), torch.randint(0, 4, (90,))
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip
    train, validation, test = (
        DataLoader(TensorDataset(x[a : a + 30], y[a : a + 30]), batch_size=30) for a in (0, 30, 60)
    )
    return tersor.Task(net.eval(), train=train, validation=validation, test=test, name="net", source="net.py")


@pytest.fixture
def machine(monkeypatch):
    """This machine's roofline without measuring it."""
    peaks = {
        name: Measurement(value, "operations/s") for name, value in (("fp32", 2e11), ("bf16", 4e11), ("int8", 8e11))
    }
    found = Roofline("this", peaks, ((math.inf, Measurement(2e10, "bytes/s")),))
    monkeypatch.setattr(fits_module, "this_roofline", lambda **settings: found)


@dataclass(frozen=True)
class Breaks(Step):
    """A step whose model answers with NaN, or that takes for ever."""

    seconds: float = 0.0

    def run(self, model, task, context=None):
        time.sleep(self.seconds)
        broken = copy.deepcopy(model)
        torch.nn.init.constant_(broken[-1].bias, math.nan)
        return Result(broken, (Plan("break", (object(),)),))


@pytest.fixture
def ways(monkeypatch):
    """Fewer candidates than there are, since each is exported: those of the names given, and the test's own."""

    def chosen(*wanted):
        own = [way for way in wanted if not isinstance(way, str)]

        def few(*args):
            return (*(way for way in candidates(*args) if way.name in wanted), *own)

        monkeypatch.setattr(advise_module, "candidates", few)

    return chosen


def test_candidates_are_tried_and_ranked_by_what_was_measured(task, machine, ways):
    ways("int8", "int4 weights", Candidate("broken", "prune", Breaks()))
    found = advise(task, seconds=0.1, threads=1)
    tried = {trial.name: trial for trial in found.trials if trial.measured}
    assert set(tried) == {"int8"}
    assert tuple(found.trials) == rank(found.trials)
    for trial in tried.values():
        assert {"speedup", "drop_points", "latency_ms", "size_bytes", "validation_accuracy"} == set(trial.measured)
        assert trial.drop.n == 30 and trial.drop.conditions["split"] == "validation"
        assert trial.verdict == verdict_of(trial.measured, 1.0) and not trial.why_not
    original = found.original["size_bytes"].value
    assert all(trial.measured["size_bytes"].value < 0.6 * original for trial in tried.values())
    assert tried["int8"].expected.value > 1
    lines = {line.topic: line for line in found.lines}
    assert {lines[topic].basis for topic in ("first", "bits", "expected gain")} == {"measured"}
    why = {trial.name: trial.why_not for trial in found.trials if trial.verdict == "not tried"}
    assert "linear layers make" in why["int4 weights"] and "finite" in why["broken"]
    assert json.loads(json.dumps(found.to_json()))["trials"][0]["name"] == found.trials[0].name


def test_what_takes_too_long_is_ended_and_what_comes_after_it_has_its_turn(task, machine, ways, monkeypatch, tmp_path):
    tersor.export_onnx(task.model, (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx")  # exporting takes seconds: once
    monkeypatch.setattr(try_out, "export_onnx", lambda model, x, path, **more: shutil.copy(tmp_path / "net.onnx", path))
    endless, last = (Candidate(name, "prune", Breaks(seconds=600)) for name in ("endless", "last"))
    ways(endless, Candidate("quick", "prune", Breaks()), last)
    said, begun = Said(), time.monotonic()
    found = advise(task, seconds=0.1, threads=1, max_seconds=4, progress=said)
    assert time.monotonic() - begun < 60
    why = {trial.name: trial.why_not for trial in found.trials}
    ended = {name: why[name].startswith("no time was enough: the limit is 4") for name in ("endless", "last")}
    assert ended["endless"] and (ended["last"] or why["last"].startswith("no time was left"))  # on a busy machine
    timed = not why["quick"]  # a process starts in what is left of the four seconds, or does not
    assert timed or why["quick"].startswith("no time was left to time it") and said.lines[-1].startswith("warning")
    assert {line.topic: line for line in found.lines}["first"].basis == ("measured" if timed else "roofline")
    assert any(line.startswith("3 ways to try on 30 samples: about") and "at most 4" in line for line in said.lines)


def test_where_the_limit_is_too_short_for_the_original_it_is_said(task, machine, ways):
    ways("int8")
    with pytest.raises(InputError, match="--max-seconds: no time to try anything"):
        advise(task, threads=1, max_seconds=0.01)
    with pytest.raises(InputError, match="--max-seconds"):
        advise(task, max_seconds=0)


def test_pruning_that_finds_nothing_is_not_reported_as_a_trial_of_both():
    net = nn.Sequential(nn.Linear(6, 4)).eval()
    data = DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8)), batch_size=8)
    given = tersor.Task(net, calibration=data).complete(needs=())
    both = {way.name: way for way in candidates(net, task_workload(given, 1), 8)}["half of the channels, int8"]
    with pytest.raises(TersorError, match="prune channels finds nothing to do; one place passed over: "):
        made(given, both.step, Progress())


def test_for_a_profile_nothing_runs_and_data_are_not_asked_for(task):
    bare = tersor.Task(task.model, calibration=task.train, name="net")
    found = advise(bare, "gpu-a100")
    assert not found.trials and found.expected and found.lines[0].topic == "first"
    with pytest.raises(InputError, match="no such profile"):
        advise(bare, "toaster")
    for wrong in ({"batch": 0}, {"seconds": math.nan}, {"limit": 0}):
        with pytest.raises(InputError, match="nothing to try"):
            advise(bare, "gpu-a100", **wrong)
    assert advise(bare, "gpu-a100", max_seconds=math.inf).settings["max_seconds"] is None


def test_linear_models_are_tried_with_dynamic_integers_and_low_bits():
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    x = torch.randn(4, 64)
    given = tersor.Task(model, calibration=DataLoader(TensorDataset(x, torch.zeros(4)), batch_size=2))
    ways = {way.name: way for way in candidates(model, task_workload(given, 1), 8)}
    assert all(ways[name].step is not None for name in ("dynamic int8", "int4 weights", "int8"))
    assert ways["int4 weights"].step.scheme.group_size == 64  # divides 64 but not 96: more than half of the weights
    odd = nn.Sequential(nn.Linear(33, 7)).eval()
    given = tersor.Task(odd, calibration=DataLoader(TensorDataset(torch.randn(4, 33), torch.zeros(4)), batch_size=2))
    ways = {way.name: way for way in candidates(odd, task_workload(given, 1), 8)}
    assert ways["int4 weights"].step is None and "no group" in ways["int4 weights"].why_not


def tried(name, speed, drop, size=1e6, family="quantise", expected=None):
    low, value, high = speed
    measured = {
        "speedup": Measurement(value, "×", low, high), "drop_points": Measurement(drop, "percentage points"),
        "size_bytes": Measurement(size, "bytes"),
    }  # fmt: skip
    return Trial(name, family, measured, expected, verdict_of(measured, 1.0))


def test_the_order_is_faster_then_repair_then_no_difference_then_slower():
    trials = [
        tried("slow", (0.5, 0.6, 0.7), 0.0),
        Trial("never", "prune", {}, None, "not tried", "does not suit"),
        tried("large", (0.9, 1.0, 1.1), 0.0, size=2e6),
        tried("small", (0.9, 0.95, 1.1), 0.0, size=1e6),
        tried("hardly", (1.01, 1.05, 1.1), 0.0),
        tried("broken", (2.0, 3.0, 4.0), 50.0),
        tried("good", (1.5, 2.0, 2.5), 0.5),
        tried("better", (2.0, 2.4, 2.5), 0.9),
    ]
    names = [trial.name for trial in rank(trials)]
    assert names == ["better", "good", "broken", "hardly", "small", "large", "slow", "never"]


def test_a_speed_up_whose_interval_holds_one_or_is_not_known_is_no_speed_up():
    assert verdict_of(tried("a", (0.99, 1.5, 2.0), 0).measured, 1.0) == "no difference shown"
    assert verdict_of(tried("a", (None, 1.5, None), 0).measured, 1.0) == "no difference shown"


def test_measured_lines_replace_those_of_the_roofline_and_keep_the_others():
    before = (Line("first", "x", "y", "roofline"), Line("alignment", "8", "a source", "profile"))
    trials = rank([
        tried("int8", (2.0, 2.1, 2.2), 0.2, expected=Measurement(3.5, "×")),
        tried("half of the channels", (2.5, 2.6, 2.7), 40.0, family="prune"),
        tried("single zeros, 80 %", (0.9, 1.0, 1.1), 60.0, family="prune"),
    ])  # fmt: skip
    lines = {line.topic: line for line in measured_lines(before, trials, "task.py")}
    assert lines["first"].what == "quantise: int8" and "2.10× (2.00–2.20)" in lines["first"].reason
    assert lines["alignment"] == before[1]
    assert lines["structure"].what == "whole channels, not single zeros"
    assert lines["expected gain"].what == "about 2.6×"
    assert "--recipe ptq" in lines["then"].what and "half of the channels, 2.60×" in lines["then"].reason
    assert measured_lines(before, [Trial("never", "prune", {}, None, "not tried", "why")], "") == before


@pytest.mark.parametrize("both", [(0.9, 1.1, 1.2), None])
def test_a_recipe_that_ends_in_int8_is_not_advised_where_int8_is_slower_or_was_not_tried(task, both):
    way = candidates(task.model, task_workload(task, 1), 8)[1]
    assert way.name == "half of the channels"
    trials = [
        tried("int8", (0.7, 0.72, 0.75), 0.0),
        replace(tried("half of the channels", (1.6, 1.7, 1.8), 40.0, family="prune"), part=way.part),
    ]
    if both is not None:
        trials.append(tried("half of the channels, int8", both, 40.0, family="both"))
    lines = {line.topic: line for line in measured_lines((), rank(trials), "task.py")}
    then = lines["then"]
    assert lines["bits"].what == "as they are, for speed" and "--recipe MINE.yaml" in then.what
    assert f"the parts {way.part} and finetune" in then.what
    assert (
        "Not --recipe fast" in then.reason
        and ("was not tried" if both is None else "without int8 1.70×") in then.reason
    )
    step = {"name": "mine", "parts": [yaml.safe_load(way.part), "finetune"]}
    assert len(parts_of(read_recipe({"name": "mine", "steps": [step]}).steps[0].step)) == 2  # the words are a recipe's


def test_a_recipe_of_ours_is_advised_where_all_of_it_was_tried():
    trials = [
        tried("half of the channels, int8", (2.5, 2.6, 2.7), 40.0, family="both"),
        tried("half of the channels", (1.6, 1.7, 1.8), 40.0, family="prune"),
    ]
    lines = {line.topic: line for line in measured_lines((), rank(trials), "task.py")}
    assert "--recipe fast" in lines["then"].what


def test_nothing_is_advised_where_nothing_is_faster():
    lines = {line.topic: line for line in measured_lines((), [tried("int8", (0.8, 0.9, 1.0), 0.0)], "task.py")}
    assert lines["first"].what == "nothing, for speed" and lines["expected gain"].what == "none shown"
    assert "then" not in lines and lines["bits"].what == "as they are, for speed"
    assert "the smallest file is that of int8, 1.00 MB" in lines["first"].reason


def test_what_no_recipe_does_is_told_as_a_part_and_what_samples_cannot_tell_as_such():
    part = "quantize_weights: {scheme: {bits: 4, group_size: 64}}"
    best = replace(tried("int4 weights", (2.0, 2.1, 2.2), 0.2), part=part)
    drop = Measurement(0.2, "percentage points", -1.0, 1.5, 30)
    unsure = replace(best, measured={**best.measured, "drop_points": drop})
    lines = {line.topic: line for line in measured_lines((), [best], "task.py")}
    assert part in lines["then"].what and "samples" not in lines
    lines = {line.topic: line for line in measured_lines((), [unsure], "task.py")}
    assert "int4 weights" in lines["samples"].reason and "30" in lines["samples"].reason
    assert "(-1.0 to 1.5 lost)" in lines["first"].reason


def test_where_channels_cannot_go_zeros_are_judged_alone():
    zeros = tried("single zeros, 80 %", (0.9, 1.0, 1.1), 0.0, family="prune")
    never = Trial("half of the channels", "prune", {}, None, "not tried", "all are frozen")
    lines = {line.topic: line for line in measured_lines((), [zeros, never], "task.py")}
    assert lines["structure"].what == "not single zeros, for speed" and "all are frozen" in lines["structure"].reason


def test_a_task_that_has_test_data_alone_fits_somewhere_too():
    task = tersor.Task(nn.Linear(6, 3), test=[(torch.randn(4, 6), torch.zeros(4).long())])
    assert fits(task, ("iot",), batch=2).totals["macs"].value == 18


def test_a_task_and_its_file_fit_alike(task, machine, tmp_path):
    tersor.export_onnx(task.model, (torch.randn(2, 3, 8, 8),), tmp_path / "net.onnx")
    given, file = fits(task, ("iot", "this"), batch=2), fits(tmp_path / "net.onnx", ("iot",), batch=2)
    assert given.totals["macs"].value == file.totals["macs"].value and given.batch == file.batch == 2
    assert given.totals["activations"].value == file.totals["activations"].value
    assert [device.profile for device in given.devices] == ["microcontroller", "this"]
    assert given.rooflines["this"].peaks["int8"].value == 8e11 and json.dumps(given.to_json())
    with pytest.raises(InputError, match="--context"):
        fits(tmp_path / "net.onnx", ("iot",), context=10)
    with pytest.raises(InputError, match="keeps no keys and values"):
        fits(task, ("iot",), context=10)
    with pytest.raises(ArtifactError, match="cannot be written"):
        fits(tmp_path / "gone.onnx", ("iot",), out=tmp_path / "net.onnx")
    with pytest.raises(InputError, match="no such open dimension"):
        fits(tmp_path / "net.onnx", ("iot",), sizes={"width": 8})
    with pytest.raises(InputError, match="--sizes: only an ONNX file"):
        fits(task, ("iot",), sizes={"width": 8})


def test_a_device_that_is_named_twice_is_shown_once_and_two_of_one_name_are_refused(task, tmp_path):
    text = to_yaml(read_profile("phone"))
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text(text.replace("207000000000.0", "1000000.0"))
    found = fits(task, ("phone", "android", tmp_path / "mine.yaml"))
    assert [device.profile for device in found.devices] == ["phone"]
    with pytest.raises(InputError, match="two devices have one name.*other.yaml"):
        fits(task, ("phone", tmp_path / "other.yaml"))


def test_the_command_line_lists_and_tells(capsys, tmp_path):
    assert main(["profiles", "--json"]) == 0
    names = [profile["name"] for profile in json.loads(capsys.readouterr().out)]
    assert {"phone", "microcontroller", "edge-tpu"} <= set(names)
    assert main(["profiles", "phone"]) == 0
    mine = (
        capsys.readouterr().out.replace("name: phone", "name: mine").replace("title: Phone", "title: my phone [/red]")
    )
    (tmp_path / "mine.yaml").write_text(mine)
    file = tmp_path / "net.onnx"
    tersor.export_onnx(nn.Sequential(nn.Linear(8, 4)).eval(), (torch.randn(2, 8),), file)
    assert main(["fits", str(file), "--on", f"iot,{tmp_path / 'mine.yaml'}", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [device["profile"] for device in told["devices"]] == ["microcontroller", "mine"]
    assert main(["fits", str(file), "--on", str(tmp_path / "mine.yaml"), "--layers"]) == 0
    assert "my phone [/red]" in capsys.readouterr().out
    assert main(["fits", str(file), "--on", "iot", "--sizes", "width"]) == 2
    assert main(["fits", str(file), "--on", "iot,edge-tpu", "--layers"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "no faster than this" in said and "cannot run" in said and "would fit: int8" in said
    assert main(["fits", str(file), "--on", "toaster"]) == 2
    assert main(["fits", str(file), "--on", ","]) == 2


def test_advice_is_shown_in_the_terminal(task, monkeypatch, capsys):
    from tersor.jobs import advise as module

    monkeypatch.setattr(module, "find_task", lambda source, progress: task)
    assert main(["advise", "net.py", "--on", "server-cpu-amx"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "quantise" in said and "expected gain" in said and "By roofline, an estimate" in said
