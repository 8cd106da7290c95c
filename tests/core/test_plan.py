import json

import torch

from tersor.core.edit import Attribute, Cut, Mask, Precision, Quantizer, Slice, Swap, Write
from tersor.core.place import ActivationPlace, TensorPlace
from tersor.core.plan import Plan, Skip

A, B = TensorPlace("a", "weight"), TensorPlace("b", "weight")
RELU = ActivationPlace("a", "relu")
PLAN = Plan(
    "by hand",
    (
        Mask(A, torch.ones(2).bool()),
        Mask(B, torch.ones(2).bool()),
        Write(A, torch.ones(2)),
        Quantizer((A, RELU), torch.ones(()), torch.zeros(()), -8, 7),
        Precision(B, torch.float16),
        Slice((Cut(B, 0, torch.tensor([0]), "producer"),)),
        Swap("c", "Identity"),
        Attribute("c", "groups", 2),
    ),
    (Skip("d", "in_features 10 is not a multiple of 4"),),
    (("a.weight", "half of it held at zero"),),
)


def test_the_summary_counts_edits_and_is_plain_json():
    summary = json.loads(json.dumps(PLAN.summary()))
    assert summary["edits"] == {
        "Mask": 2,
        "Write": 1,
        "Quantizer": 1,
        "Precision": 1,
        "Slice": 1,
        "Swap": 1,
        "Attribute": 1,
    }
    assert summary["skips"] == [{"place": "d", "reason": "in_features 10 is not a multiple of 4"}]
    assert summary["lines"] == [["a.weight", "half of it held at zero"]] and summary["method"] == "by hand"


def test_it_prints_counts_lines_and_skips():
    lines = str(PLAN).splitlines()
    assert lines[0].startswith("by hand: 2 × Mask, 1 × Write")
    assert lines[1:] == ["  a.weight: half of it held at zero", "  skipped d: in_features 10 is not a multiple of 4"]
    assert str(Plan("nothing")) == "nothing: no edits"


def test_places_name_everything_touched_once_and_in_order():
    assert PLAN.places() == (A, B, RELU, "c")
