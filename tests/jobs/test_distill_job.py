"""The job that distils, on a small real task: by a factory from the command line, resumed, loaded; and bad input."""

import json
import sys
from pathlib import Path

import pytest
import torch

import tersor
from tersor.cli.main import main
from tersor.core.errors import InputError
from tersor.core.progress import Progress
from tersor.core.step import Step
from tersor.distill.response import DecoupledSoftTargets, Distill, MatchLogits, SoftTargets
from tersor.jobs.distill import distill_student, objective_of
from tersor.jobs.student import Student
from tersor.recipes.recipe import read_recipe
from tersor.recipes.registry import STEPS
from tersor.run.measure_step import Timing
from tersor.train.objective import TaskLoss

TASKS = Path(__file__).parent.parent / "tasks"
TINY, SMALL = TASKS / "tiny.py", TASKS / "small.py"
QUICK = Timing(0.05, 1)


class Stopped(Exception):
    pass


class Stopping(Progress):
    """Stops in the second epoch."""

    def track(self, items, description, total=None):
        for number, item in enumerate(items):
            if description == "epoch 2/2" and number == 3:
                raise Stopped
            yield item


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_student_by_its_factory_is_distilled_resumed_reported_and_loaded(tmp_path, capsys):
    asked = [str(TINY), "-o", str(tmp_path / "run"), "--student", str(SMALL), "--epochs", "2", "--threads", "1"]
    asked += ["--timing-seconds", "0.05", "--temperature", "3", "--cache", str(tmp_path / "cache"), "--views", "1"]
    limits = ["--max-drop", "90%", "--max-size", "4KB"]  # the second one is missed
    assert main(["distill", *asked, *limits, "--json"]) == 3
    summary = json.loads(capsys.readouterr().out)
    (step,) = summary["steps"]
    assert step["facts"]["teacher"]["hits"] == 500 and "review" in step["facts"]
    assert summary["ratios"]["parameters"] > 5 and "--student=" in summary["reproduce"]["command"]
    assert summary["reproduce"]["command"].endswith("--max-drop 90 --max-size 4000 --timing-seconds 0.05 --threads 1")
    assert [line["met"] for line in summary["verdict"]["budgets"]] == [True, False]
    (part,) = summary["recipe"]["steps"][0]["settings"]["parts"]
    assert part["distill"]["training"]["objective"]["distill"]["temperature"] == 3.0
    assert main(["load-check", str(tmp_path / "run"), "--quiet"]) == 0

    teach = STEPS.build(Step, part, "part")
    again = tmp_path / "again"
    with pytest.raises(Stopped):
        distill_student(str(TINY), str(SMALL), again, teach=teach, timing=QUICK, progress=Stopping())
    done = tersor.resume(again)
    assert weights(again) == weights(tmp_path / "run")
    student = tersor.load(again / "model", model=type(done.model)(width=8))
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(student(x), done.model(x))
    assert "Distil into" in (again / "report.html").read_text()


def test_a_student_may_come_of_the_task_and_of_nothing_else(tmp_path):
    with pytest.raises(InputError, match="one origin"):
        Student("a:b", drop_layers=2)
    with pytest.raises(InputError, match="its own teacher"):
        distill_student(str(TINY), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("student", "teachers", "says"),
    [
        (f"{SMALL}:wrong_classes", (), "different numbers of classes. Got teacher 10, student 7"),
        (f"{SMALL}:no_module", (), "gave no module. Got int"),
        (f"{SMALL}:nothing", (), "no function nothing"),
        ("no.py:small", (), r"no such file.* a function small\(\) that returns a torch.nn.Module"),
        ("nonsense", (), "not the name of a function"),
        (str(SMALL), (f"{SMALL}:no_module",), "gave no teacher"),
    ],
)
def test_what_cannot_be_distilled_is_told_before_anything_is_written(tmp_path, student, teachers, says):
    sys.path.insert(0, str(TASKS))
    try:
        with pytest.raises(tersor.TersorError, match=says):
            distill_student(str(TINY), student, tmp_path / "run", teachers=teachers)
    finally:
        sys.path.remove(str(TASKS))
    assert not (tmp_path / "run").exists()


def test_the_loss_follows_the_options():
    assert objective_of() == Distill()
    assert objective_of("distill", 2.0, 0.5) == Distill(2.0, 0.5)
    assert objective_of("soft_targets", 2.0) == SoftTargets(2.0)
    assert objective_of("decoupled", 2.0) == TaskLoss() + DecoupledSoftTargets(temperature=2.0)
    assert objective_of("match_logits", alpha=0.25) == 0.25 * MatchLogits() + 0.75 * TaskLoss()
    with pytest.raises(InputError, match="--temperature"):
        objective_of("match_logits", 2.0)
    with pytest.raises(InputError, match="--loss"):
        objective_of("nonsense")


def test_the_step_stands_in_recipes_with_its_training_and_its_cache():
    part = {
        "distill": {"training": {"epochs": 3, "average": {"decay": 0.99}}, "cache": {"folder": "runs/t", "views": 2}}
    }
    (step,) = read_recipe({"name": "mine", "steps": [{"name": "distill", "parts": [part]}]}).steps
    assert step.step.cache == tersor.TeacherCache("runs/t", 2)
    assert step.step.training.epochs == 3 and step.step.training.average == tersor.Average(0.99)
    assert STEPS.settings(step.step) == step.settings["parts"][0]


@pytest.mark.parametrize("said", ["2", "two"])
def test_a_run_of_several_processes_is_refused_by_each(said, tmp_path, monkeypatch, capsys):
    """Else the second one would wait for "another process" that began the same run."""
    monkeypatch.setenv("WORLD_SIZE", said)
    out = tmp_path / "run"
    for command in (["distill", str(TINY), "-o", str(out), "--student", str(SMALL)], ["resume", str(out)]):
        assert main(command) == 2
        assert "a run is of one process" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "")
    assert main(["resume", str(out)]) == 2 and "one process" not in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"student": torch.nn.Linear(2, 2)}, r"student: a run builds its student itself. Got Linear.*Teach\("),
        (
            {"student": Student(drop_layers=2), "teachers": [torch.nn.Linear(2, 2)]},
            r"teachers: a run builds.*reference=",
        ),
        ({"student": Student(drop_layers=2), "teachers": "models.py:teacher"}, "teachers: a run builds.*Got str"),
        ({"student": Student(drop_layers=2), "teachers": torch.nn.Linear(2, 2)}, "teachers: a run builds.*Got Linear"),
    ],
)
def test_modules_in_place_of_names_are_told_where_they_go(given, words, tmp_path):
    with pytest.raises(InputError, match=words):
        distill_student(TINY, out=tmp_path / "run", **given)
