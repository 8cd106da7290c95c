import re

import pytest
import torch

from tersor.core.edit import Quantizer
from tersor.core.place import ActivationPlace
from tersor.quantize.outliers import outliers
from tersor.quantize.ranges import Entropy, MinMax, Percentile
from tersor.quantize.schemes import Int

U8 = Int(8, "per_tensor", symmetric=False)


def sample(n=20000, rare=5, size=400.0):
    torch.manual_seed(0)
    x = torch.randn(n).relu()
    x[:rare] = size
    return x


def said(x, estimator, scheme=U8):
    scale, zero_point = estimator.parameters(x[None], scheme)
    place = (ActivationPlace("", "relu"),)
    return outliers(x, Quantizer(place, scale[0], zero_point[0], scheme.quant_min, scheme.quant_max), scheme)


@pytest.mark.parametrize("scheme", [U8, Int(8, "per_tensor"), Int(4, "per_tensor", symmetric=False)])
def test_a_few_huge_values_are_said_with_a_range_whose_step_really_is_that_much_finer(scheme):
    x = sample()
    line = said(x, MinMax(), scheme)
    assert re.search(r"99.9 % of the values lie within 3\.\d+, the largest is 400, and the range goes to 400", line)
    finer = int(re.search(r"activation_range=Percentile\(percent=99.9\) makes the step (\d+) times finer", line)[1])
    steps = [float(estimator.parameters(x[None], scheme)[0]) for estimator in (MinMax(), Percentile(99.9))]
    assert finer == round(steps[0] / steps[1]) > 50
    assert said(x, Percentile(99.9), scheme) == "" == said(sample(rare=0), MinMax(), scheme)


def test_where_so_few_values_were_seen_that_a_percentile_keeps_the_outlier_another_range_is_named():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(3072), torch.tensor([400.0, 400.0])])
    assert float(Percentile(99.9).bounds(x[None], U8)[1]) > 100
    assert f"activation_range={Entropy()} makes" in said(x, MinMax())


def test_many_exact_zeros_make_no_outliers_of_the_rest_and_few_values_tell_nothing():
    x = torch.zeros(100_000)
    x[:3000] = torch.rand(3000) + 1
    assert said(x, MinMax()) == ""
    assert said(sample(1500), MinMax()) == ""
