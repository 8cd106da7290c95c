import json

import pytest
import torch
from torch import nn

from tersor.core.apply import apply
from tersor.core.edit import Mask
from tersor.core.errors import InputError
from tersor.core.place import TensorPlace
from tersor.core.plan import Plan
from tersor.measure.capacity import capacity


def test_capacity_counts_a_convolution_by_hand():
    teacher = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4))
    student = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 16, 4)).half()
    found = capacity(student, teacher, (torch.zeros(3, 1, 4, 4).half(),), (torch.zeros(3, 1, 4, 4),))
    assert found.student["parameters"].value == 2 * 9 + 2 + 32 * 4 + 4
    assert found.teacher["macs"].value == 16 * 9 * 8 + 128 * 4
    assert found.student["size_bytes"].value == 2 * 152 and found.teacher["size_bytes"].value == 4 * 596
    assert found.ratio("macs") == pytest.approx((16 * 9 * 2 + 32 * 4) / (16 * 9 * 8 + 128 * 4))
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["parameters"]["ratio"] == pytest.approx(152 / 596)
    assert [line.split()[0] for line in str(found).splitlines()[1:]] == ["parameters", "nonzeros", "macs", "size_bytes"]


def test_a_masked_student_has_fewer_weights_that_are_not_zero_and_as_many_bytes():
    teacher = nn.Linear(4, 4, bias=False)
    teacher.weight.data.fill_(1.0)
    keep = torch.arange(16).reshape(4, 4) % 4 == 0
    student = apply(teacher, Plan("by hand", (Mask(TensorPlace("", "weight"), keep),)))
    found = capacity(student, teacher, (torch.zeros(1, 4),))
    assert (found.ratio("nonzeros"), found.ratio("parameters"), found.ratio("size_bytes")) == (0.25, 1.0, 1.0)


def test_student_and_teacher_of_different_types_are_counted_on_the_same_inputs():
    teacher, student = nn.Sequential(nn.Conv2d(1, 8, 3)).bfloat16(), nn.Conv2d(1, 2, 3)
    found = capacity(student, teacher, (torch.zeros(2, 1, 4, 4),))
    assert found.ratio("macs") == 0.25 and found.ratio("size_bytes") == 0.5
    with pytest.raises(InputError, match="example_inputs: the model does not run. Got RuntimeError"):
        capacity(student, teacher, (torch.zeros(2, 3, 4, 4),))
