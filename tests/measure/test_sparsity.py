"""Zeros, changed weights and bytes of a model's layers, counted by hand."""

import zlib

import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.measure.redundancy import redundancy
from tersor.measure.size import storage, storage_total
from tersor.measure.sparsity import sparsity, structured_against_unstructured, weight_changes


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 8, bias=False))


def masked():
    model = network()
    keep = torch.rand(4, 2, 3, 3) > 0.5
    keep[1] = False
    return model, keep, apply(model, Plan("mask", (Mask(TensorPlace("0", "weight"), keep),)))


def test_zeros_are_counted_by_layer_and_in_all():
    _, keep, model = masked()
    conv, linear, total = sparsity(model)
    zeros, empty = int((~keep).sum()), int((keep.flatten(1).sum(1) == 0).sum())
    assert conv == {
        "path": "0", "tensor": "weight", "parameters": 72, "zeros": zeros, "sparsity": zeros / 72,
        "empty_outputs": empty, "outputs": 4,
    }  # fmt: skip
    assert empty >= 1 and linear["zeros"] == 0 and linear["path"] == "2"
    assert total["tensor"] == "<model>" and total["sparsity"] == zeros / 200 and total["outputs"] == 12
    assert sparsity(nn.Sequential(nn.ReLU())) == ()


def test_changed_weights_are_compared_as_the_forward_uses_them():
    original, keep, model = masked()
    conv, linear = weight_changes(original, model)
    w = original[0].weight.detach().double()
    left = w * keep
    assert conv["mean_error"] == pytest.approx(float((w - left).abs().mean()))
    assert conv["norm_kept"] == pytest.approx(float(left.norm() / w.norm()))
    assert conv["mean_relative_error"] == pytest.approx(float((~keep).double().mean()))
    assert linear["quality"] == 1.0 and (conv["path"], conv["tensor"], conv["parameters"]) == ("0", "weight", 72)
    with pytest.raises(InputError, match="no weight of one shape"):
        weight_changes(original, nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_counted_and_refused_by_name(wrong):
    model, original = network(), network()
    with torch.no_grad():
        model[0].weight.view(-1)[:3] = wrong
    looks = (
        lambda: redundancy(model), lambda: weight_changes(original, model),
        lambda: structured_against_unstructured(model, "0", 0.5),
    )  # fmt: skip
    for look in looks:
        with pytest.raises(InputError, match=r"^0.weight: .*not finite.* Got (3 NaN and 0|0 NaN and 3) infinite of 72"):
            look()


def test_single_weights_and_whole_channels_are_compared_on_one_layer():
    model = network()
    w = model[0].weight.detach()
    single, whole = structured_against_unstructured(model, "0", 0.5)
    order = w.abs().flatten().sort().values
    assert single["zeros"] == 36 and single["max_error"] == pytest.approx(float(order[35]))
    strongest = w.flatten(1).norm(dim=1).sort(descending=True).values[:2]
    assert whole["zeros"] == 36 and whole["parameters_left"] == 36 and whole["dense_bytes"] == 36 * 4
    assert whole["norm_kept"] == pytest.approx(float(strongest.norm() / w.norm()))
    assert single["dense_bytes"] == 72 * 4 and single["smallest_bytes"] == 36 * 4 + 9
    few = nn.Sequential(nn.Linear(200, 50))
    single, few_whole = structured_against_unstructured(few, "0", 0.96)
    assert single["smallest_bytes"] < 400 * 4 + 400 * 2 and few_whole["smallest_bytes"] == 2 * 200 * 4, "gaps, dense"
    single, whole = structured_against_unstructured(model, "0", 0.5)
    assert single["norm_kept"] > whole["norm_kept"] and single["quality"] > whole["quality"]
    for path, fraction, match in (
        ("0", 1.0, "not a fraction"),
        ("1", 0.5, "no such tensor"),
        ("9", 0.5, "no such mod"),
    ):
        with pytest.raises(InputError, match=match):
            structured_against_unstructured(model, path, fraction)


def test_bytes_of_every_encoding_and_of_a_zip_stand_side_by_side():
    _, keep, model = masked()
    rows = storage(model)
    conv = next(row for row in rows if (row["path"], row["tensor"]) == ("0", "weight"))
    ones = int(keep.sum())
    assert (conv["path"], conv["zeros"], conv["bytes"]["dense"]) == ("0", 72 - ones, 288)
    assert conv["bytes"]["bitmap"] == 4 * ones + 9 and conv["bytes"]["csr"] == 4 * ones + ones + 5
    assert conv["bytes"][conv["smallest"]] == min(conv["bytes"].values())
    assert conv["zip_bytes"] == len(zlib.compress(model[0].weight.detach().numpy().tobytes(), 6))
    assert sorted((row["path"], row["tensor"]) for row in rows) == [("0", "bias"), ("0", "weight"), ("2", "weight")]
    total = storage_total(rows)
    assert total["dense"] == 4 * (72 + 4 + 128) and total["smallest"] == sum(min(r["bytes"].values()) for r in rows)
    assert total["zip"] == sum(row["zip_bytes"] for row in rows) and total["csr"] >= total["smallest"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bytes_follow_the_type(dtype):
    model = network().to(dtype)
    assert storage_total(storage(model))["dense"] == torch.finfo(dtype).bits // 8 * 204
