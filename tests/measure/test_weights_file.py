import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tersor.files import weights
from tersor.files.open import open_weights
from tersor.measure import weights_file
from tersor.measure.redundancy import NEAR_ZERO, PERCENTILES
from tersor.measure.weights_file import weights_facts
from tersor.tensor.encodings import sizes
from tersor.tensor.masks import n_of_m


def facts_of(tensors, path):
    save_file(tensors, path, {"format": "pt"})
    found = weights_facts(open_weights(path))
    assert found.metadata == {"format": "pt"}
    return {tensor.name: tensor for tensor in found.tensors}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_facts_are_those_of_the_tensor(tmp_path, monkeypatch, dtype, small):
    if small:
        monkeypatch.setattr(weights, "PIECE", 1000)
    tensor = torch.randn(60, 80, generator=torch.manual_seed(0))
    tensor = (tensor * (tensor.abs() > 0.3)).to(dtype)
    found = facts_of({"w": tensor}, tmp_path / "a.safetensors")["w"]
    size = tensor.abs().double().flatten()
    assert found.zeros == pytest.approx(float((size == 0).double().mean()))
    assert found.mean_magnitude == pytest.approx(float(size.mean()), rel=1e-6)
    assert found.near_zero == pytest.approx(float((size <= NEAR_ZERO * size.mean()).double().mean()), abs=1e-3)
    expected = np.percentile(size.numpy(), PERCENTILES, method="inverted_cdf")
    assert list(found.percentiles.values()) == pytest.approx(expected.tolist(), rel=1 / 8192)
    assert found.encodings == sizes(tensor) and found.dense_bytes == tensor.numel() * tensor.element_size()


def test_n_of_m_is_found_along_the_inputs_of_linear_layers_and_convolutions(tmp_path):
    linear, convolution = torch.randn(8, 16), torch.randn(8, 8, 3, 3)
    tensors = {
        "two": linear * n_of_m(linear.abs(), 2, 4),
        "one": convolution * n_of_m(convolution.abs(), 1, 4, axis=1),
        "none": linear,
    }
    found = facts_of({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    patterns = {name: {key for key in facts.encodings if ":" in key} for name, facts in found.items()}
    assert patterns == {"two": {"2:4"}, "one": {"1:4", "2:4"}, "none": set()}
    assert found["one"].smallest == "1:4"


def test_numbers_that_are_not_finite_are_counted_and_left_out_of_the_rest(tmp_path):
    tensor = torch.tensor([[1.0, float("nan"), -float("inf"), 3.0]])
    bad = torch.full((2, 2), float("nan"))
    found = facts_of({"w": tensor, "bad": bad, "ids": torch.ones(2).int()}, tmp_path / "a.safetensors")
    assert found["w"].not_finite == 2 and found["w"].mean_magnitude == 2.0
    assert found["bad"].not_finite == 4 and found["bad"].percentiles == {} and found["bad"].near_zero is None
    assert found["ids"].zeros is None and found["ids"].encodings == {"dense": 8}


def test_zip_is_measured_or_said_to_be_estimated(tmp_path, monkeypatch):
    zeros = {"w": torch.zeros(100, 100), "r": torch.randn(100, 100)}
    found = facts_of(zeros, tmp_path / "a.safetensors")
    assert found["w"].zip_bytes < 200 and not found["w"].zip_sampled
    assert 30_000 < found["r"].zip_bytes < 40_000
    monkeypatch.setattr(weights, "PIECE", 4000)
    monkeypatch.setattr(weights_file, "_ZIPPED", 10_000)
    sampled = facts_of(zeros, tmp_path / "a.safetensors")
    assert sampled["r"].zip_sampled and sampled["r"].zip_bytes == pytest.approx(found["r"].zip_bytes, rel=0.05)
