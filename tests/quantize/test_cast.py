"""Cast: half the bytes in memory, in the artifact and in the ONNX file; float32 in and out."""

import copy

import onnx
import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask, Precision
from tersor.core.errors import InputError
from tersor.core.place import ByName, TensorPlace
from tersor.core.plan import Plan
from tersor.core.task import Task
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.onnx import export_onnx
from tersor.quantize.cast import Cast
from tersor.quantize.fold import FoldBatchNorm

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.inner, self.outer = nn.Linear(16, 64), nn.Linear(64, 16)
        self.embed, self.head = nn.Embedding(200, 64), nn.Linear(64, 200, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        hidden = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        hidden = hidden + self.outer(torch.relu(self.inner(hidden)))
        tokens = self.embed((x.flatten(1)[:, :4] * 20).long().abs() % 200)
        return self.head(tokens.mean(1) + self.inner(hidden))


def made():
    torch.manual_seed(0)
    model = Tied().eval()
    return model, Task(model, example_inputs=(X,), calibration=[(X, torch.zeros(6))])


def rounded(model, dtype):
    """The reference: every matrix rounded, by hand, in a float32 model."""
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expected.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype))
    return expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_artifact_and_the_onnx_file_are_half_and_compute_what_rounded_weights_compute(dtype, tmp_path, ship):
    original, task = made()
    folded = FoldBatchNorm().run(original, task)  # else the exporter folds, in float32
    model, result = folded.model, Cast(dtype).run(folded.model, task)
    cast, expected = result.model, rounded(model, getattr(torch, dtype))
    assert torch.equal(cast(X), expected(X)) and cast(X).dtype == torch.float32
    assert not torch.equal(cast(X), model(X))
    assert len(result.plans[0].edits) == 4 and cast.head.parametrizations.weight.original is (
        cast.embed.parametrizations.weight.original
    )
    files = []
    for name, whole in (("before", model), ("cast", cast)):
        plans = folded.plans + (result.plans if whole is cast else ())
        save_artifact(tmp_path / name, whole, original=original, plans=plans)
        shipped = ship(whole, X)
        files.append((tmp_path / "shipped.onnx").stat().st_size)
    assert torch.equal(load_artifact(tmp_path / "cast", Tied())(X), expected(X))
    matrices = sum(value.nbytes for value in model.parameters() if value.ndim > 1)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("before", "cast")]
    assert sizes[0] - sizes[1] == pytest.approx(matrices / 2, rel=0.01)
    assert files[0] - files[1] == pytest.approx(matrices / 2, rel=0.05)  # the casts take some bytes
    stored = onnx.load(tmp_path / "shipped.onnx").graph.initializer
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in stored if len(t.dims) > 1} == {dtype.upper()}
    assert torch.allclose(shipped(X), expected(X), atol=1e-5) and not torch.allclose(shipped(X), model(X), atol=1e-4)
    assert shipped.histogram["Cast"] == 1  # that of the tokens: those of the weights are folded


def test_batch_norms_that_the_exporter_would_fold_in_float32_are_said():
    model, task = made()
    assert "1 batch norms" in dict(Cast().plan(model, task).lines)["the model"]
    assert "the model" not in dict(Cast().plan(FoldBatchNorm().run(model, task).model, task).lines)


def test_masks_stay_and_gradients_flow(tmp_path):
    model, task = made()
    model = FoldBatchNorm().run(model, task).model
    keep = torch.rand(64, 16) > 0.5
    model = apply(model, Plan("mask", (Mask(TensorPlace("inner", "weight"), keep),)))
    cast = Cast().run(model, task).model
    assert not cast.inner.weight[~keep].any() and cast.inner.weight[keep].all()
    assert torch.equal(cast.inner.weight, model.inner.weight.half().float())
    export_onnx(cast, (X,), tmp_path / "masked.onnx")
    stored = {t.data_type for t in onnx.load(tmp_path / "masked.onnx").graph.initializer if len(t.dims) > 1}
    assert stored == {onnx.TensorProto.FLOAT16}  # and no mask
    cast(X).sum().backward()
    assert cast.inner.parametrizations.weight.original.grad[keep].any()


def test_what_overflows_or_was_left_out_or_is_half_already_is_a_skip():
    model, task = made()
    with torch.no_grad():
        model.inner.weight[0, 0] = 1e5
    plan = Cast(where=~ByName("conv")).plan(model, task)
    assert {str(edit.place) for edit in plan.edits} == {"outer.weight", "embed.weight"}
    assert {skip.place: skip.reason for skip in plan.skips}["inner.weight"] == (
        "stays float: 1e+05 is beyond float16's 65504; bfloat16 reaches it"
    )
    assert dict(plan.lines)["outer.weight"].startswith("float16, 2,048 bytes instead of 4,096, relative squared error")
    again = Cast("bfloat16").plan(apply(model, plan), task)
    assert {str(edit.place) for edit in again.edits} == {"conv.weight", "inner.weight"}
    assert {"outer.weight", "embed.weight"} <= {skip.place for skip in again.skips}
    assert not Cast().plan(made()[0].half(), task).edits


def test_impossible_casts_are_refused():
    model, _ = made()
    with pytest.raises(InputError, match=r"Cast.dtype.*float16"):
        Cast("int8")
    edit = Precision(TensorPlace("norm", "running_mean"), torch.float16)
    for wrong in (edit, Precision(TensorPlace("conv", "weight"), torch.int8)):
        with pytest.raises(InputError, match="half precision, once"):
            apply(model, Plan("by hand", (wrong,)))
    once = Precision(TensorPlace("conv", "weight"), torch.float16)
    with pytest.raises(InputError, match="half precision, once"):
        apply(model, Plan("by hand", (once, once)))
