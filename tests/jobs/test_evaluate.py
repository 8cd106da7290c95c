"""tersor evaluate: two models of any kind; the same numbers in Python, in the file and in the terminal; exit codes."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import nn

import tersor
from tersor.cli.main import main
from tersor.core.errors import ArtifactError, InputError
from tersor.jobs.evaluate import evaluate
from tersor.jobs.find_data import find_data
from tersor.jobs.find_model import find_model
from tersor.jobs.find_task import find_task
from tersor.measure.behaviour.data import EvaluationData
from tersor.measure.behaviour.gate import Limits
from tersor.measure.behaviour.robustness import Stress
from tersor.measure.behaviour.schema import parse_evaluation
from tersor.measure.runnable import Runnable

TASK = """
import torch, tersor
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
torch.manual_seed(0)
x = torch.randn(300, 8)
y = (x[:, 0] > 0).long()
sex = ["f" if flag else "m" for flag in (x[:, 2] > 0).tolist()]

def net(noise=0.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].weight[0, 0], model[0].weight[1, 0] = 3, -3
        model[2].weight[:, :2] = torch.tensor([[-2.0, 2.0], [2.0, -2.0]])
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model

model = net
def worse(): return net(0.3)
def other_classes(): return nn.Linear(8, 3)
def no_model(): return 3
def data(): return DataLoader(TensorDataset(x, y), batch_size=100)
def task(): return tersor.Task(net(), data(), data(), data())
def batches():
    return [{"x": x[a:a + 100], "y": y[a:a + 100], "sex": sex[a:a + 100]} for a in range(0, 300, 100)]
def grouped():
    task = tersor.Task(net(), test=batches(), inputs_of=lambda batch: ((batch["x"],), {}))
    return tersor.EvaluationData(
        task, groups_of=lambda batch: {"sex": batch["sex"]}, classes=("no", "yes"), outside=[{"x": x * 0.1}]
    )
def unlabelled(): return [x[:150], x[150:]]
def bare(): return tersor.EvaluationData(unlabelled())
def few(): return tersor.Task(net(), test=[(x[:12], y[:12])])
"""
QUICK = ["--severities", "5", "--budgets", "none", "--stress-samples", "50"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate") / "pair.py"
    path.write_text(TASK)
    return path


@pytest.fixture(scope="module")
def onnx_file(file):
    path = file.parent / "worse.onnx"
    model = find_model(f"{file}:worse", tersor.Task(nn.Identity())).module
    names = ("w0", "b0", "w1", "b1")
    weights = [numpy_helper.from_array(p.detach().numpy(), n) for n, p in zip(names, model.parameters(), strict=True)]
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h"], transB=1), helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w1", "b1"], ["y"], transB=1),
    ]  # fmt: skip
    x, y = (helper.make_tensor_value_info(name, 1, ["batch", size]) for name, size in (("x", 8), ("y", 2)))
    graph = helper.make_graph(nodes, "worse", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_an_unknown_format_is_refused_before_anything_is_measured(file, tmp_path, capsys):
    assert main(["evaluate", "task", f"{file}:no_model", "--data", f"{file}:task", "--format", "html,pdf"]) == 2
    assert "unknown format" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "there are no numbers to report" in capsys.readouterr().err


def test_what_is_measured_later_comes_into_the_report_that_lies_there(file, onnx_file, tmp_path, capsys):
    options = ["--severities", "none", "--budgets", "none"]
    assert main(["evaluate", "task", str(onnx_file), "--data", f"{file}:task", "-o", str(tmp_path), *options]) == 0
    before = (tmp_path / "evaluation.html").read_text()
    assert main(["fits", str(onnx_file), "--on", "iot", "-o", str(tmp_path)]) == 0
    after = (tmp_path / "evaluation.html").read_text()
    assert "What fits where" in after and "What fits where" not in before


def test_threads_are_those_of_files_too(file, onnx_file, monkeypatch, capsys):
    from tersor.measure import session

    asked, opened = [], session.open_session
    monkeypatch.setattr(
        session, "open_session", lambda path, **more: (asked.append(more["threads"]), opened(path, **more))[1]
    )
    options = ["--data", f"{file}:task", "--severities", "none", "--budgets", "none", "--threads", "1", "--json"]
    assert main(["evaluate", "task", str(onnx_file), *options]) == 0
    assert asked == [1] and json.loads(capsys.readouterr().out)["settings"]["threads"] == 1


def test_a_task_without_a_name_is_called_after_its_module(file, monkeypatch):
    monkeypatch.syspath_prepend(file.parent)
    (file.parent / "package").mkdir(exist_ok=True)
    (file.parent / "package" / "inner.py").write_text(TASK)
    assert find_data("package.inner:task").based.name == "inner" and find_data(f"{file}:task").based.name == "pair"


def test_the_command_prints_what_it_writes_and_says_how_it_went(file, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(["evaluate", "task", f"{file}:worse", "--data", f"{file}:grouped", "-o", str(out), *QUICK])
    shown = capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    assert code == 0 and found["gate"]["status"] == "nothing asked"
    assert "</html>" in (out / "evaluation.html").read_text() and f"{out / 'evaluation.html'}" in shown.replace(
        "\n", ""
    )
    assert main(["report", str(out), "--format", "md,csv"]) == 0 and (out / "evaluation.md").read_text().startswith(
        "# "
    )
    assert "quality/drop" in (out / "evaluation.csv").read_text() and capsys.readouterr()
    for words in (
        "accuracy",
        "calibration error",
        "top 1",
        "sex: f",
        "sex: demographic parity",
        "dropped values 5",
        "elsewhere",
        "yes",
    ):
        assert words in shown, shown
    assert parse_evaluation(found).to_json() == found
    assert found["data"]["kind"] == "classes" and found["data"]["samples"] == 300 and len(found["flips"]["worst"]) == 16
    assert {each["name"] for each in found["robustness"]["corruptions"]} == {"noise", "dropped_values"}
    assert found["fairness"][0]["name"] == "sex" and found["outside"]["original_auroc"]["value"] > 0.5
    assert main(["evaluate", "task", f"{file}:worse", "--data", f"{file}:grouped", "--json", *QUICK]) == 0
    printed = json.loads(capsys.readouterr().out)
    for volatile in ("seconds",):
        printed.pop(volatile), found.pop(volatile)
    assert printed == found


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--max-drop", "90%"], 0),
        (["--max-drop", "0.5%", "--min-agreement", "97%"], 3),
        (["--min-agreement", "70%"], 0),
        (["--max-ece-increase", "0.9", "--application", "safety"], 3),
        (["--max-group-gap", "90%"], 0),
    ],
)
def test_the_gate_ends_in_an_exit_code(file, capsys, options, code):
    arguments = ["evaluate", f"{file}:model", f"{file}:worse", "--data", f"{file}:grouped", "--severities", "none"]
    assert main([*arguments, "--budgets", "none", *options]) == code
    assert ("failed" in capsys.readouterr().out) == (code == 3)


def test_too_few_samples_end_in_four(file, capsys):
    arguments = ["evaluate", "task", "task", "--data", f"{file}:few", "--severities", "none", "--budgets", "none"]
    assert main([*arguments, "--max-drop", "1%"]) == 4
    said = " ".join(capsys.readouterr().out.split())
    assert "not enough data" in said and "12 samples are few" in said


def test_files_modules_and_functions_give_the_same_numbers(file, onnx_file):
    limits = Limits(max_drop=90)
    from_function = evaluate(f"{file}:model", f"{file}:worse", f"{file}:grouped", limits=limits, stress=None)
    from_file = evaluate("task", onnx_file, f"{file}:grouped", limits=limits, stress=None)
    module = find_model(f"{file}:worse", tersor.Task(nn.Identity())).module
    from_module = evaluate("task", module, find_data(f"{file}:grouped"), limits=limits, stress=None)
    assert from_file.compressed.backend.startswith("ONNX Runtime")
    for name in ("top_1", "divergence"):
        values = [each.agreement[name].value for each in (from_function, from_file, from_module)]
        np.testing.assert_allclose(values, values[0], atol=1e-6)
    assert from_function.quality.drop == from_module.quality.drop == from_file.quality.drop


def test_two_files_need_no_model_of_the_datas_own(file, onnx_file, capsys):
    code = main(["evaluate", str(onnx_file), str(onnx_file), "--data", f"{file}:data", *QUICK, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["quality"]["drop"]["value"] == 0 and found["agreement"]["top_1"]["value"] == 1
    assert found["original"]["name"] == "worse (original)" and found["compressed"]["name"] == "worse (compressed)"
    assert any("attacks" in each["what"] for each in found["skipped"])
    with pytest.raises(InputError, match="the data bring no model"):
        evaluate("task", onnx_file, f"{file}:data")


def test_a_file_is_attacked_with_what_was_made_against_the_module(file, onnx_file):
    found = evaluate("task", onnx_file, f"{file}:grouped", stress=Stress(60, (), (0.1,), 3)).robustness
    assert {each.against for each in found.attacks} == {"task"} and len(found.attacks) == 2
    assert found.attacks[1].original.value < found.clean.original.value


def test_data_without_targets_still_tell_agreement(file):
    found = evaluate(f"{file}:model", f"{file}:worse", f"{file}:unlabelled", stress=Stress(50, (5,), (), 0))
    assert found.quality is None and found.calibration is None and not found.data.labelled
    assert 0 < found.agreement["top_1"].value < 1 and "changed" in found.flips.measurements
    assert found.robustness.corruptions[0].original is None and found.robustness.corruptions[0].agreement.n == 50
    assert {"quality and calibration", "groups"} <= {each.what for each in found.skipped}
    with pytest.raises(InputError, match="--max-drop.*without targets"):
        evaluate(f"{file}:model", f"{file}:worse", f"{file}:unlabelled", limits=Limits(max_drop=1), stress=None)


def test_an_artifact_and_a_run_are_models(file, tmp_path):
    task = find_data(f"{file}:task").based
    plan = tersor.Prune(0.5).plan(task.model, task.complete())
    pruned = tersor.apply(task.model, plan)
    tersor.save(tmp_path / "half", pruned, original=task.model, plans=[plan])
    found = evaluate("task", tmp_path / "half", task, stress=None)
    same = evaluate("task", pruned, task, stress=None)
    assert found.agreement == same.agreement and found.compressed.name == "half"
    with pytest.raises(ArtifactError, match="not the artifact's original"):
        evaluate("task", tmp_path / "half", tersor.Task(nn.Linear(8, 2), test=task.test))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["task", "FILE:other_classes", "--data", "FILE"], ["differ in shape", "[100, 3]"]),
        (["task", "FILE:no_model", "--data", "FILE"], ["no model", "int"]),
        (["task", "absent.onnx", "--data", "FILE"], ["no such ONNX file"]),
        (["task", "nowhere", "--data", "FILE"], ["not a model", "no such file or folder"]),
        (["task", "FILE.cut.onnx", "--data", "FILE"], ["no ONNX file"]),
        (["task", "FILE:worse", "--data", "FILE:no_model"], ["no data", "int"]),
        (["task", "FILE:worse", "--data", "FILE", "--min-agreement", "97"], ["min_agreement", "fraction"]),
        (["task", "FILE:worse", "--data", "FILE", "--max-group-gap", "2%"], ["--max-group-gap", "no sensitive"]),
        (["task", "FILE:worse", "--data", "FILE", "--application", "toaster"], ["toaster", "safety (1 points)"]),
        (["task", "FILE:worse", "--data", "FILE", "--severities", "9"], ["severities of 1 to 5"]),
        (["task", "FILE:worse", "--data", "FILE", "--budgets", "lots"], ["--budgets", "lots"]),
        (["task", "FILE:worse"], ["--data"]),
    ],
)
def test_what_cannot_be_compared_is_one_clear_message(file, tmp_path, capsys, arguments, words):
    cut = file.with_suffix(".py.cut.onnx")
    cut.write_bytes(b"\x08\x0a\x12")
    code = main(
        ["evaluate", *(argument.replace("FILE", str(file)) for argument in arguments), "-o", str(tmp_path / "o")]
    )
    said = capsys.readouterr().err
    assert code == 2, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said and "defect" not in said and not (tmp_path / "o").exists()


def test_an_evaluation_of_another_version_or_shape_is_an_artifact_error(file):
    found = evaluate("task", f"{file}:worse", f"{file}:few", stress=None).to_json()
    with pytest.raises(ArtifactError, match="another version"):
        parse_evaluation({**found, "schema": 2})
    with pytest.raises(ArtifactError, match="at quality.drop.unit"):
        del found["quality"]["drop"]["unit"]
        parse_evaluation(found)


def test_a_repeated_evaluation_gives_the_same_numbers(file):
    one, other = (
        evaluate("task", f"{file}:worse", f"{file}:grouped", stress=Stress(60, (3,), (0.05,), 2)).to_json()
        for _ in range(2)
    )
    one.pop("seconds"), other.pop("seconds")
    assert one == other


class Labelled(nn.Linear):
    def __init__(self, *labels):
        super().__init__(8, len(labels))
        self.config = SimpleNamespace(id2label=dict(enumerate(labels)))


def test_label_maps_that_differ_are_refused_and_those_that_agree_name_the_classes(file):
    data = find_data(f"{file}:task")
    one = Labelled("cat", "dog")
    with pytest.raises(InputError, match="label maps differ.*'cat'"):
        evaluate(one, Labelled("dog", "cat"), data, stress=None)
    assert evaluate(one, Labelled("LABEL_0", "LABEL_1"), data, stress=None).data.class_names == ("cat", "dog")
    assert Runnable("plain", nn.Linear(8, 2)).labels is None


def test_a_folder_that_cannot_be_one_is_refused_before_anything_is_measured(file, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert main(["evaluate", "task", "absent.onnx", "--data", str(file), "-o", str(out)]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_a_bare_loader_is_data_and_a_bare_callable_is_no_model(file):
    batches = find_data(f"{file}:data").based.test
    assert evaluate(f"{file}:net", f"{file}:worse", batches, stress=None).data.samples == 300
    with pytest.raises(InputError, match="Runnable"):
        evaluate(f"{file}:net", lambda x: x, batches, stress=None)


def test_splits_that_are_the_same_data_are_noted(file):
    found = evaluate(f"{file}:net", f"{file}:worse", f"{file}:task", stress=None)
    (note, *_) = [note for note in found.notes if "the same data" in note]
    assert note.startswith("validation and test are the same data, at least their first 100 samples: decisions")
    bare = evaluate(f"{file}:net", f"{file}:worse", f"{file}:grouped", stress=None)
    assert not any("the same data" in note for note in bare.notes)


def test_an_error_in_data_from_elsewhere_says_whose_it_is(file):
    data = find_data(f"{file}:grouped")
    with pytest.raises(InputError, match="EvaluationData.outside"):
        evaluate("task", "task", dataclasses.replace(data, outside=[{"x": data.outside[0]["x"][:, :5]}]), stress=None)


def test_a_favourable_class_that_is_none_is_refused(file):
    with pytest.raises(InputError, match="EvaluationData.positive.*0 to 1"):
        evaluate("task", "task", dataclasses.replace(find_data(f"{file}:grouped"), positive=7), stress=None)


def test_data_of_a_task_are_a_task_for_other_commands(file):
    task = find_task(f"{file}:grouped")
    assert isinstance(task.model, nn.Module) and task.source == f"{file}:grouped"
    with pytest.raises(InputError, match="returned no Task"):
        find_task(f"{file}:bare")


def test_evaluation_data_say_what_they_lack():
    with pytest.raises(InputError, match="no test data"):
        EvaluationData(tersor.Task(nn.Identity()))


def test_the_page_specifies_what_is_written():
    from pathlib import Path

    from tersor.report.schema_page import EVALUATION, rewrite

    page = (Path(__file__).parents[2] / "docs" / "evaluate.md").read_text(encoding="utf-8")
    assert rewrite(page, EVALUATION) == page, "run: python -m tersor.report.schema_page docs/evaluate.md"
