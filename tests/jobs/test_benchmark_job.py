import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tersor
from tersor.cli.main import main
from tersor.core.apply import apply
from tersor.core.errors import ArtifactError, InputError
from tersor.export.half import store_file_half
from tersor.jobs.contenders import Engines
from tersor.jobs.find_task import find_task
from tersor.measure.benchmark_schema import parse_benchmark
from tersor.measure.runnable import Runnable
from tersor.report.schema_page import BENCHMARK, rewrite

BRIEF = tersor.Conditions(batch_sizes=(2,), threads=(1,), seconds=0.05, window=0, starts=0)
MODELS = """
import tersor, torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).eval()

def task():
    data = torch.utils.data.TensorDataset(torch.randn(16, 8), torch.randint(0, 3, (16,)))
    return tersor.Task(model(), test=torch.utils.data.DataLoader(data, batch_size=8))
"""


def net():
    return torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3)).eval()


def task(**more):
    return tersor.Task(net(), example_inputs=(torch.randn(2, 8),), **more)


@pytest.fixture
def file(tmp_path):
    return tersor.export_onnx(net(), (torch.randn(2, 8),), tmp_path / "net.onnx").path


def written(path, batch="n", width=8, domain="", op="Relu", external=None):
    """An ONNX file of one product and one operator."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, width])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.ones((width, 4), np.float32), "w")
    if external:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=external)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(op, ["h"], ["y"], domain=domain)]
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return path


@pytest.mark.slow
def test_a_named_module_a_module_of_this_process_and_a_file_in_one_run(tmp_path, file):
    source = tmp_path / "mine.py"
    source.write_text(MODELS)
    found = tersor.benchmark(
        "task", net(), file, data=str(source), out=tmp_path / "out",
        conditions=tersor.Conditions((1,), (1,), seconds=0.1, window=0.05, starts=1),
    )  # fmt: skip
    own, live, stored = found.models
    assert [each.name for each in found.models] == ["mine", "Sequential", "net"]
    assert own.backend.endswith("eager") and live.backend.endswith("exported graph") and "ONNX" in stored.backend
    assert own.load_ms is None and live.load_ms.value > 0
    assert own.size_bytes.value == live.size_bytes.value == 4 * (8 * 32 + 32 + 32 * 3 + 3)
    assert stored.size_bytes.value == file.stat().st_size
    assert all(each.peak_memory_bytes.value > 0 for each in found.models)
    assert {(each.base, each.model) for each in found.comparisons} >= {("mine", "net"), ("Sequential", "net")}
    assert len(found.comparisons) == 3 and found.inputs == "samples of mine (test)"
    assert all(each.outputs == ((1, 3),) and each.throughput.value > 0 for each in found.timings)
    assert parse_benchmark(json.loads((tmp_path / "out" / "benchmark.json").read_text())) == found


def test_namesakes_are_called_as_they_were_typed_and_simulated_integers_are_said(tmp_path, file):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(file, folder / "model.onnx")
    complete = task(name="mine")
    quantised = apply(net(), tersor.QuantizeDynamically().plan(net(), complete))
    found = tersor.benchmark("task", folder / "model.onnx", quantised, data=complete, conditions=BRIEF)
    assert [each.name for each in found.models] == ["task", str(folder / "model.onnx"), "Sequential"]
    (note,) = [note for note in found.notes if "simulates" in note]
    assert note.startswith("Sequential: ") and "model.onnx" in note


def test_a_module_whose_outputs_are_of_a_class_of_a_library_is_carried_too(package):
    transformers = package("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    net = transformers.ViTForImageClassification(config).eval()
    data = tersor.Task(net, example_inputs=(torch.randn(2, 3, 8, 8),), output_of=lambda result: result.logits)
    found = tersor.benchmark(net, data=data, conditions=BRIEF)
    assert found.timings[0].outputs[0] == (2, 2)


def test_a_module_in_half_precision_is_carried_with_inputs_of_its_type():
    half = torch.nn.Conv2d(3, 4, 3).bfloat16()
    found = tersor.benchmark(half, data=tersor.Task(half, example_inputs=(torch.randn(2, 3, 8, 8),)), conditions=BRIEF)
    assert found.timings[0].outputs[0] == (2, 4, 6, 6)


def test_modules_run_on_onnx_runtime_too_and_in_bfloat16(file):
    engines = Engines(names=("onnxruntime",), bfloat16=True)
    found = tersor.benchmark(net(), file, data=task(source="x"), conditions=BRIEF, engines=engines)
    assert [each.name for each in found.models] == ["Sequential", "Sequential@bf16", "net", "net@bf16"]
    assert [each.precision for each in found.models] == ["as stored", "bfloat16"] * 2
    assert all("ONNX Runtime" in each.backend for each in found.models)
    assert found.models[3].size_bytes.value < found.models[2].size_bytes.value - 2 * (8 * 32 + 32 * 3) + 400


def test_a_file_in_bfloat16_has_rounded_weights_and_the_same_operators(tmp_path, file):
    half = store_file_half(file, tmp_path / "half.onnx")
    stored = {each.data_type for each in onnx.load(half).graph.initializer if len(each.dims) > 1}
    assert stored == {TensorProto.BFLOAT16}
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    one, other = (onnxruntime.InferenceSession(str(path)).run(None, {"input": x})[0] for path in (file, half))
    assert 0 < np.abs(one - other).max() < 0.02 * np.abs(one).max()
    with pytest.raises(InputError, match="no float32 weights"):
        store_file_half(half, tmp_path / "again.onnx")
    found = tersor.benchmark(half, conditions=BRIEF, engines=Engines(bfloat16=True))
    assert [each.name for each in found.models] == ["half"]
    assert [each.what for each in found.skipped if "float32" in each.why] == ["half@bf16"]


def test_files_alone_need_no_data_and_the_same_file_twice_has_two_names(tmp_path):
    path = written(tmp_path / "a.onnx")
    found = tersor.benchmark(path, path, conditions=BRIEF)
    assert [each.name for each in found.models] == ["a", "a (2)"]
    assert "random inputs of the shapes that a.onnx declares" in found.inputs and len(found.comparisons) == 1


def test_a_task_that_got_another_model_is_measured_with_that_one(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(MODELS)
    wide = torch.nn.Linear(8, 5).eval()
    given = dataclasses.replace(find_task(source), model=wide)
    found = tersor.benchmark("task", data=given, conditions=BRIEF)
    assert found.timings[0].outputs == ((2, 5),)


def test_a_task_whose_code_goes_to_another_folder_is_found_again(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text("import os; os.chdir('/')" + MODELS)
    monkeypatch.chdir(tmp_path)
    assert len(tersor.benchmark("task", data="sub/mine.py", conditions=BRIEF).timings) == 1


def test_one_model_alone_is_compared_with_nothing(tmp_path):
    found = tersor.benchmark(written(tmp_path / "a.onnx"), conditions=BRIEF)
    assert len(found.timings) == 1 and found.comparisons == ()


def test_a_fixed_batch_dimension_leaves_only_that_batch(tmp_path):
    a, b = written(tmp_path / "a.onnx", batch=2), written(tmp_path / "b.onnx")
    found = tersor.benchmark(a, b, conditions=tersor.Conditions((1, 2, 32), (1,), 0.05, 0, 0))
    assert {each.batch for each in found.timings} == {2}
    assert {each.what for each in found.skipped} >= {"batch 1", "batch 32"}
    with pytest.raises(InputError, match="different fixed batch"):
        tersor.benchmark(a, written(tmp_path / "c.onnx", batch=4), conditions=BRIEF)


def test_the_command_prints_json_or_a_table_with_verdicts(tmp_path, capsys):
    path = written(tmp_path / "[red]a.onnx")
    options = ["--batch", "2", "--threads", "1", "--seconds", "0.05", "--window", "0", "--starts", "0"]
    assert main(["benchmark", str(path), str(path), *options, "--json"]) == 0
    assert len(parse_benchmark(json.loads(capsys.readouterr().out)).timings) == 2
    assert main(["benchmark", str(path), str(path), *options]) == 0
    said = capsys.readouterr().out
    assert "[red]a (2) (batch 2, 1 thread): " in said and "p99" in said and "left out: load time" in said


def damaged(path):
    path.write_bytes(written(path).read_bytes()[:60])
    return path


@pytest.mark.parametrize(
    "make, error, match",
    [
        (damaged, ArtifactError, "no ONNX file"),
        (lambda path: path, ArtifactError, "no such ONNX file"),
        (lambda path: written(path, domain="evil.org", op="Run"), InputError, "custom operators.*evil.org::Run"),
        (lambda path: written(path, external="/etc/passwd"), ArtifactError, "outside its own folder"),
        (lambda path: written(path, width=5), InputError, "another shape.*8.*5"),
    ],
)
def test_files_that_cannot_be_measured_are_refused(tmp_path, make, error, match):
    with pytest.raises(error, match=match):
        tersor.benchmark(written(tmp_path / "good.onnx"), make(tmp_path / "bad.onnx"), conditions=BRIEF)


@pytest.mark.parametrize(
    "models, data, match",
    [
        ((), None, "no model"),
        ((net(),), None, "nothing to give.*--data"),
        ((net(),), tersor.Task(net()), "nothing to give"),
        ((Runnable("f", lambda x: x),), task(), "bare callable"),
        (("gone",), task(), "not a model"),
    ],
)
def test_what_cannot_be_measured_is_named(models, data, match):
    with pytest.raises(InputError, match=match):
        tersor.benchmark(*models, data=data, conditions=BRIEF)


def test_a_module_that_cannot_be_carried_over_says_what_to_do():
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(InputError, match="cannot be carried.*Name the model"):
        tersor.benchmark(Branches(), data=task(), conditions=BRIEF)


@pytest.mark.parametrize(
    "wrong",
    [{"names": ("tensorrt",)}, {"names": ()}, {"device": "mps"}, {"device": "cuda:x"}, {"providers": ("warp",)}],
)
def test_engines_that_are_not_there_are_refused(wrong):
    with pytest.raises(InputError, match="no such"):
        Engines(**wrong)


def test_a_command_with_wrong_numbers_is_wrong_usage(tmp_path, capsys):
    path = str(written(tmp_path / "a.onnx"))
    assert main(["benchmark", path, "--batch", "1,zero"]) == 2
    assert main(["benchmark", path, "--engine", "eager, tensorrt"]) == 2
    said = capsys.readouterr().err
    assert "1,32" in said and "('eager', 'tensorrt')" in said


def test_the_page_specifies_the_file_as_it_is():
    page = (Path(tersor.__file__).parent.parent / "docs" / "benchmark.md").read_text()
    assert rewrite(page, BENCHMARK) == page, "run: python -m tersor.report.schema_page docs/benchmark.md"
