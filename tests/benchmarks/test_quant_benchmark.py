"""The quantisation benchmark on small networks: arms are what they say, and claims follow the differences."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import quant, tables
from benchmarks.distillation.tasks import VisionTransformer
from benchmarks.quantization import arms, page, speed
from benchmarks.quantization.networks import NETWORKS
from benchmarks.results import Finished
from tersor.core.measurement import Measurement
from tersor.core.metric import ACCURACY
from tersor.core.step import Context
from tersor.core.task import Task
from tersor.measure.quality import evaluate
from tersor.train.finetune import Finetune
from tersor.zoo.batches import TensorBatches
from tersor.zoo.residual import ResidualNet

PEERS = ("torchao", "neural-compressor")


def small_task(model, shape=(3, 8, 8)):
    torch.manual_seed(0)
    images, targets = torch.randn(64, *shape), torch.arange(64) % 10
    batches = TensorBatches(images, targets, 32)
    train = TensorBatches(images, targets, 32, shuffle=True)
    return Task(model.eval(), train, batches, batches, batches, metric=ACCURACY, name="small").complete()


def finished(right):
    return Finished(1.0, 1.0, 0.0, np.asarray(right, dtype=bool))


def test_every_arm_of_a_convolutional_network_runs_on_its_grid(tmp_path):
    torch.manual_seed(0)
    task = small_task(ResidualNet((8,), 1, in_channels=3, classes=10))
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    exact = task.model(task.example_inputs[0]).detach()
    errors = {}
    for arm in arms.convolutional(Finetune(1)):
        if arm.name in (arms.TRAINED, arms.QAT) or any(peer in arm.name for peer in PEERS):
            continue
        made = arm.make(task, Context(), tmp_path / "small.onnx")
        errors[arm.name] = float((made(task.example_inputs[0]).detach() - exact).norm() / exact.norm())
        assert len(evaluate(made, task, "test").values) == 64
    assert errors[arms.FP32] == 0 and 0 < errors[arms.PTQ] < 0.05 and 0 < errors[arms.ORT] < 0.05
    assert errors[arms.RTN4] > 2 * errors[arms.PTQ]
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_every_arm_of_a_transformer_rounds_its_weights(tmp_path):
    torch.manual_seed(0)
    task = small_task(VisionTransformer(32, 1, 2), (1, 28, 28))
    exact = task.model(task.example_inputs[0]).detach()
    errors = {}
    for arm in arms.transformer():
        if any(peer in arm.name for peer in PEERS):
            continue
        made = arm.make(task, Context(), tmp_path / "small.onnx")
        errors[arm.name] = float((made(task.example_inputs[0]).detach() - exact).norm())
    for method in ("nearest", "GPTQ"):
        assert 0 < errors[f"weights 4 bits, {method}"] < errors[f"weights 3 bits, {method}"]


def test_claims_follow_the_differences():
    right = np.arange(1000) % 10 != 0
    worse = right & (np.arange(1000) % 50 != 1)  # two points below
    found = {arms.FP32: [finished(right)], arms.PTQ: [finished(right)], arms.QAT4: [finished(worse)]}
    found |= {arms.RTN4: [finished(right)], arms.GPTQ4: [finished(worse)]}
    made = {claim.text: claim for claim in page.claims("small", found)}
    assert [claim.holds for claim in made.values()] == [True, False, False]
    text = page.section("small", "said", found)
    assert "**Missed**: small, QAT W4A8" in text and "-2.00" in text


def test_speed_claims_are_about_resnet18():
    def row(kind, size, speedup):
        ms = Measurement(1.0, "ms", 0.9, 1.1, 9)
        found = Measurement(speedup, "×", speedup - 0.1, speedup + 0.1, 9) if speedup else None
        return speed.Timed("ResNet-18", kind, size, ms, ms, found)

    rows = [row(speed.FP32, 400, None), row(speed.OURS, 100, 2.2)]
    faster, smaller = speed.claims(rows)
    assert faster.holds is False and "2.20×" in faster.found and smaller.holds is True
    assert "4.00×" in speed.rows_table(rows)
    assert speed.claims([]) == []


def test_the_page_names_what_is_not_installed(tmp_path, monkeypatch, capsys):
    task = small_task(ResidualNet((8,), 1, in_channels=3, classes=10))
    monkeypatch.setattr(quant, "_tasks", lambda part, args, progress: [(0, task)])
    monkeypatch.setattr(quant, "PACKAGES", {"neural-compressor": "no_such_package_at_all", "torchao": "torchao"})
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    run = [
        "bench",
        "--parts",
        "fashion",
        "--quiet",
        "--out",
        str(tmp_path / "out"),
        "--only",
        "fp32",
        "PTQ int8",
        "comp",
    ]
    monkeypatch.setattr(sys, "argv", run)
    quant.main()
    text = (tmp_path / "quant.md").read_text()
    assert "left out: neural-compressor" in text and "PTQ int8, repaired" in text
    assert (tmp_path / "out" / "fashion.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("name", NETWORKS)
def test_architectures_are_of_the_usual_size(name, package):
    package("torchvision")
    package("transformers")
    from benchmarks.quantization.networks import NETWORKS as networks

    make, arguments, inputs = networks[name]
    with torch.device("meta"):
        model: nn.Module = make(*arguments)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    usual = {"ResNet-18": 11.69, "MobileNet-v2": 3.50, "MobileNet-v3 large": 5.48, "EfficientNet-b0": 5.29,
             "BERT-small, 128 tokens": 28.8, "ViT-tiny": 5.7}  # fmt: skip
    assert millions == pytest.approx(usual[name], rel=0.01) and inputs().shape[0] == 8
