"""What ONNX Runtime really runs of quantised models of torchvision and transformers: its graph's operators."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tersor.core.step import Pipeline
from tersor.core.task import Task
from tersor.export.onnx import export_onnx
from tersor.export.verify import integer_share, operator_histogram, verify_onnx
from tersor.quantize.fold import FoldBatchNorm
from tersor.quantize.quantize import Quantize

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def resnet(package):
    torchvision = package("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    with torch.no_grad():
        model(F.interpolate(torch.randn(32, 3, 4, 4), scale_factor=8))  # the batch norms' statistics
    model.eval()
    return model, F.interpolate(torch.randn(48, 3, 4, 4), scale_factor=8)  # random pixels all look alike


def bert(package):
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=16, num_labels=3, **SIZES)
    return livelier(transformers.BertForSequenceClassification(config)), torch.randint(0, 60, (48, 11))


def vit(package):
    transformers = package("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **SIZES)
    return livelier(transformers.ViTForImageClassification(config)), torch.randn(48, 3, 16, 16)


def livelier(model):
    """Weights as large as training makes them: of those that it begins with logits are nearly constant."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.mul_(6)
            if isinstance(module, nn.Linear):
                module.bias.normal_(std=0.1)
    return model.eval()


def logits(result):
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.fixture(scope="module")
def deployed(tmp_path_factory):
    """``deployed(make, package)``: the file of a quantised model, and what its verification found."""
    made = {}

    def deploy(make, package):
        if make not in made:
            model, inputs = make(package)
            with torch.no_grad():
                targets = logits(model(inputs)).argmax(-1)
            data = [(inputs, targets)]
            task = Task(model, data, data, data, example_inputs=(inputs[:2],), output_of=logits).complete()
            result = Pipeline((FoldBatchNorm(), Quantize(learn=False))).run(model, task)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            export_onnx(result.model, (inputs[:2],), path, output_of=logits)
            made[make] = path, verify_onnx(path, result.model.eval(), task, quantized=True)
        return made[make]

    return deploy


def test_all_of_a_torchvision_resnet_runs_in_integers(deployed, package):
    path, _ = deployed(resnet, package)
    histogram = operator_histogram(path)
    assert histogram.pop("Transpose", 0) <= 2  # to the runtime's channels-last layout and back
    pool = histogram.pop("NhwcMaxPool", 0) + histogram.pop("MaxPool", 0)
    assert pool == 1
    assert histogram == {
        "QLinearConv": 12, "QLinearAdd": 4, "QLinearGlobalAveragePool": 1, "QGemm": 1, "Reshape": 1,
        "QuantizeLinear": 1, "DequantizeLinear": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (bert, {"QGemm": 8, "QLinearAdd": 2, "MatMulIntegerToFloat": 1, "QLinearMatMul": 1}),
        (vit, {"QLinearConv": 1, "QGemm": 7, "MatMulIntegerToFloat": 1, "QLinearMatMul": 1}),
    ],
)
def test_linear_layers_attention_patches_and_additions_run_in_integers(make, expected, deployed, package):
    path, _ = deployed(make, package)
    histogram = operator_histogram(path)
    assert {name: histogram.get(name, 0) for name in expected} == expected
    assert integer_share(path) == {"integer": 10, "total": 10, "share": 1.0, "float_layers": []}


def test_what_stays_float_of_bert_is_named(deployed, package):
    path, facts = deployed(bert, package)
    assert not {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Where", "IsNaN", "Mul"} & set(operator_histogram(path))
    assert set(facts["float_operators"]) == {
        "QuantizeLinear", "DequantizeLinear", "Add", "LayerNormalization", "Softmax", "Gelu", "Tanh",
    }  # fmt: skip


@pytest.mark.parametrize("make", [resnet, bert, vit])
def test_the_file_gives_what_the_quantised_model_gives(make, deployed, package):
    _, facts = deployed(make, package)
    assert facts["equal"] and facts["within_one_step"] >= 0.99, facts
