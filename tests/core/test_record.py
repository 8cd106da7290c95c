import json

from tersor.core.measurement import Measurement
from tersor.core.record import Record

RECORD = Record(
    number=2, name="prune", title="Prune channels", settings={"sparsity": 0.5},
    measurements={
        "accuracy": Measurement(0.98, "fraction", 0.96, 0.99, 360, conditions={"split": "test"}),
        "size": Measurement(1234, "bytes"),
    },
    seed=5, seconds=1.5, plans=({"method": "prune"},), history=({"epoch": 0, "loss": 0.1},), facts={"verified": 1e-7},
    layers=({"path": "conv"},), versions={"torch": "2.13"},
)  # fmt: skip


def test_a_record_goes_through_a_line_of_json_and_back():
    line = json.dumps(RECORD.to_json(), allow_nan=False)
    back = Record.from_json(json.loads(line))
    assert json.dumps(back.to_json()) == line
    assert back.measurements == RECORD.measurements


def test_a_measurement_keeps_its_interval_and_conditions():
    data = RECORD.measurements["accuracy"].to_json()
    assert data == {
        "value": 0.98, "unit": "fraction", "low": 0.96, "high": 0.99, "n": 360, "device": "cpu",
        "conditions": {"split": "test"},
    }  # fmt: skip
    assert Measurement.from_json(data) == RECORD.measurements["accuracy"]
