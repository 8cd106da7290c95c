"""What the report says beside the verdict."""

from tersor.core.record import Record
from tersor.report.findings import findings
from tersor.report.schema import parse_summary


def told(summary, records=()):
    return "\n".join(findings(parse_summary(summary), records))


def set_speed(summary, batch, value, low, high):
    measured = summary["ratio_intervals"][f"latency_batch_{batch}"]
    summary["ratio_intervals"][f"latency_batch_{batch}"] = {**measured, "value": value, "low": low, "high": high}
    summary["ratios"][f"latency_batch_{batch}"] = value


def test_macs_that_fell_while_the_clock_did_not_are_told(summary):
    set_speed(summary, 1, 1.01, 0.95, 1.07)
    assert "MACs fell 4.0× and the clock did not at batch 1: 1.01× [0.95, 1.07]" in told(summary)
    assert "and the clock did not at batch 32" not in told(summary)


def test_a_speed_up_that_keeps_pace_with_the_macs_is_no_finding(summary):
    for batch in (1, 32):
        set_speed(summary, batch, 3.9, 3.7, 4.1)
    assert "MACs" not in told(summary)


def test_a_model_that_became_slower_is_told(summary):
    set_speed(summary, 32, 0.8, 0.75, 0.86)
    assert "Slower than the original at batch 32: 0.80× [0.75, 0.86] its speed." in told(summary)


def test_int8_that_is_not_faster_names_what_stayed_float(summary):
    summary["steps"][-1]["measurements"]["speedup_batch_1"]["value"] = 1.5
    assert (
        "int8 is not faster here (batch 1: 1.86× the original's speed before, 1.50× after); stayed float: stem."
        in told(summary)
    )
    summary["steps"][-1]["facts"]["onnx"]["integer_share"]["float_layers"] = []
    assert "stayed float: Conv ×1." in told(summary)


def test_int8_that_is_not_faster_names_what_computes_in_float_between_integers(summary):
    onnx, measured = summary["steps"][-1]["facts"]["onnx"], summary["steps"][-1]["measurements"]
    onnx["float_operators"] = {"DequantizeLinear": 12, "Sigmoid": 9, "Conv": 1}
    for batch in (1, 32):
        measured[f"speedup_batch_{batch}"]["value"] = 9.0
    said = "; between integers these compute in float: DequantizeLinear ×12, Sigmoid ×9."
    assert said not in told(summary)  # faster: not worth a word
    measured["speedup_batch_1"]["value"] = 1.5
    assert said in told(summary)
    onnx["float_operators"] = {f"Kind{n}": 20 - n for n in range(10)}
    assert "Kind7 ×13 and 2 more." in told(summary)


def test_int8_as_the_first_step_is_held_against_one_whatever_the_original_came_to_against_itself(summary):
    summary["steps"] = summary["steps"][-1:]
    summary["baseline"]["measurements"]["speedup_batch_1"] = {"value": 1.39, "unit": "×", "low": 1.16, "high": 79.0}
    last = summary["steps"][0]["measurements"]
    last["speedup_batch_1"]["value"] = 1.2
    last["speedup_batch_32"]["value"] = 0.8
    assert "int8 is not faster here (batch 32: 0.80× the original's speed)" in told(summary)


def test_one_conversion_each_way_is_the_models_own_input_and_output(summary):
    onnx, measured = summary["steps"][-1]["facts"]["onnx"], summary["steps"][-1]["measurements"]
    measured["speedup_batch_1"]["value"] = 1.5
    onnx["float_operators"] = {"QuantizeLinear": 1, "DequantizeLinear": 1}
    assert "int8 is not faster here" in told(summary) and "between integers" not in told(summary)
    onnx["float_operators"] = {"QuantizeLinear": 3, "DequantizeLinear": 3}
    assert "these compute in float: QuantizeLinear ×3, DequantizeLinear ×3." in told(summary)


def test_weights_alone_in_integers_are_not_said_to_be_int8(summary):
    onnx, measured = summary["steps"][-1]["facts"]["onnx"], summary["steps"][-1]["measurements"]
    measured["speedup_batch_1"]["value"] = 0.9
    onnx["operators"] = {"Conv": 9, "MatMulNBits": 1}
    onnx["integer_share"] |= {"integer": 1}
    assert "int8" not in told(summary)
    onnx["operators"] |= {"QLinearConv": 1}
    onnx["integer_share"] |= {"integer": 2}
    assert "int8 is not faster here" in told(summary)


def test_a_file_that_differs_from_pytorch_is_told_with_the_layer_where_they_part(summary):
    onnx = summary["steps"][-1]["facts"]["onnx"]
    assert "and PyTorch differ" not in told(summary)  # a run of before this was noted
    onnx |= {"equal": True, "within_one_step": 0.9931}
    assert "and PyTorch differ" not in told(summary)
    onnx |= {"equal": False, "within_one_step": 0.9712, "parts_at": "blocks.1.conv2:conv2d[0]"}
    assert "“int8” and PyTorch differ: 97.1 % of its outputs are at most one step apart" in told(summary)
    assert "; the integers part at blocks.1.conv2:conv2d[0]. After training, RoundBiases()" in told(summary)
    del onnx["parts_at"]
    assert "part at" not in told(summary) and "and PyTorch differ" in told(summary)


def test_a_file_that_answers_differently_is_told_by_its_answers(summary):
    onnx = summary["steps"][-1]["facts"]["onnx"]
    onnx |= {"equal": False, "within_one_step": 0.998, "top1_agreement": 0.9911, "n": 900}
    assert "it answers as PyTorch for 99.1 % of 900 samples" in told(summary)
    onnx |= {"within_one_step": None, "relative_error": 0.2}
    del onnx["top1_agreement"]
    assert "and PyTorch differ: its relative error is 0.2." in told(summary)


def test_int8_that_is_faster_everywhere_and_whole_is_no_finding(summary):
    last = summary["steps"][-1]
    last["measurements"]["speedup_batch_1"]["value"] = 9.0
    last["measurements"]["latency_ms_batch_1"]["value"] = 0.9  # another sitting's milliseconds say nothing
    last["facts"]["onnx"] |= {"integer_share": {"integer": 9, "float_layers": []}, "operators": {"QLinearConv": 9}}
    assert "int8" not in told(summary)


def test_zeros_that_save_nothing_are_told(summary):
    weights = summary["final"]["measurements"]["parameters"]["value"]
    summary["final"]["measurements"]["nonzeros"]["value"] = 0.5 * weights
    assert "50 % of the weights are zero" in told(summary)


def test_a_budget_whose_interval_reaches_over_the_limit_is_told(summary):
    assert "“max drop” is kept, but its interval [−0.6, 1.2] reaches beyond the limit of 1.0 points" in told(summary)
    summary["verdict"]["budgets"][0] |= {"value": 1.4, "low": 0.6, "high": 2.2, "met": False}
    assert "is missed, but its interval [0.6, 2.2] holds the limit" in told(summary)


def test_a_run_that_stopped_half_way_is_told(summary):
    summary |= {"steps": summary["steps"][:2], "final": None}
    assert "2 of the recipe's 4 steps have finished" in told(summary)


def test_an_earlier_step_that_is_shipped_is_told(summary):
    summary["final"] |= {"number": 3, "name": "distill"}
    assert "the model after “distill”, not after the last step, “int8”" in told(summary)


def test_a_step_that_edited_nothing_is_told(summary, records):
    idle = Record(**{**records[1].__dict__, "plans": ({**records[1].plans[0], "edits": {}},)})
    assert "Step 1, “prune”, found nothing to do (PruneChannels)." in told(summary, [idle])
    assert "nothing to do" not in told(summary, records)
