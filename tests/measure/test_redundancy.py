import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.measure.redundancy import energy_rank, redundancy


def test_a_row_says_what_numpy_says():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    (row,) = redundancy(nn.Sequential(layer))
    weight = np.abs(layer.weight.detach().numpy().astype(np.float64))
    assert (row["path"], row["tensor"], row["channels"], row["full_rank"]) == ("0", "weight", 8, 8)
    assert row["near_zero"] == pytest.approx(float((weight <= 0.1 * weight.mean()).mean()))
    assert row["percentiles"]["p90"] == pytest.approx(float(np.percentile(weight, 90)))
    assert row["std"] == pytest.approx(float(layer.weight.detach().std(correction=0)), rel=1e-5)


def test_masked_and_dead_channels_are_seen_through_the_mask():
    layer = nn.Linear(6, 4)
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1] = False
    (row,) = redundancy(apply(layer, Plan("", (Mask(TensorPlace("", "weight"), keep),))))
    assert (row["dead_channels"], row["zeros"]) == (1, 0.25)


def test_a_dead_layer_is_all_dead():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight)
    (row,) = redundancy(layer)
    assert (row["dead_channels"], row["rank_95"], row["near_zero"]) == (4, 0, 1.0)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_energy_rank_is_the_singular_values(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64)
    squares = torch.linalg.svdvals(matrix) ** 2
    expected = next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= 0.95 * squares.sum())
    assert energy_rank(matrix) == expected


def test_energy_rank_of_a_low_rank_matrix_is_its_rank():
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64))[0]
    assert energy_rank(q @ q.T) == 3


def test_vectors_have_no_row():
    assert redundancy(nn.BatchNorm1d(4)) == ()
