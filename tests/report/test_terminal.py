"""What commands print, in 80 columns, from plain data."""

from rich.console import Console

from tersor.report.columns import TIMES_APART
from tersor.report.html import render
from tersor.report.onnx_facts import load_check_view
from tersor.report.terminal import (
    agreement_line,
    dry_run_view,
    inspection_view,
    layer_view,
    plan_view,
    redundancy_view,
    summary_table,
    verdict_line,
)


def printed(thing, width=80):
    console = Console(width=width, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(thing)
    return capture.get()


def test_the_summary_fits_eighty_columns_with_a_row_for_each_stage(summary):
    text = printed(summary_table(summary))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    named = [line.split()[0] for line in lines if line.strip() and line.split()[0].isalnum()]
    assert named[:7] == ["after", "original", "prune", "recover", "distill", "int8", "final"]
    assert "[97.4, 99.4]" in text and "2.09 MB" in text and "4.7×" in text and "…" not in text


def test_beside_milliseconds_of_sittings_apart_the_table_says_that_only_the_ratio_compares(summary, records):
    said = " ".join(printed(summary_table(summary)).split())
    assert TIMES_APART in said and TIMES_APART in render(summary, records)
    for stage in [summary["baseline"], *summary["steps"], summary["final"]]:
        stage["measurements"] = {n: m for n, m in stage["measurements"].items() if not n.startswith("speedup")}
    assert TIMES_APART not in render(summary, records)  # nothing that compares is there


def test_a_summary_without_measurements_prints_dashes(summary):
    for stage in [summary["baseline"], *summary["steps"], summary["final"]]:
        stage["measurements"] = {}
    assert printed(summary_table(summary)).count("–") >= 6 * 7


def test_markup_in_names_is_printed_as_it_stands(summary):
    summary["steps"][0]["name"] = "[red]x"
    assert "[red]x" in printed(summary_table(summary))
    skips = [{"place": "layers[bold].0", "reason": "[/] odd"}]
    plan = {"method": "Prune[x]", "edits": {}, "lines": [["a[red]", "b[/red]"]], "skips": skips}
    text = printed(plan_view([plan]))
    assert all(part in text for part in ("Prune[x]: nothing to do", "a[red]", "b[/red]", "layers[bold].0", "[/] odd"))


def test_the_verdict_begins_with_its_status(summary):
    assert printed(verdict_line(summary), 300).startswith("passed: 14.1× smaller")
    summary["verdict"]["status"] = "missed"
    assert printed(verdict_line(summary), 300).startswith("budget missed: ")


def test_a_plan_lists_what_it_does_and_groups_what_it_skips(records):
    text = " ".join(printed(plan_view(records[4].plans)).split())
    assert "Quantize: 38 × Quantizer" in text and "stem int8 per channel" in text
    assert text.count("its input is quantised already") == 1 and "and 4 more" in text


def test_a_load_check_is_told_in_the_words_of_the_report_and_does_not_contradict_itself():
    found = {
        "n": 360, "relative_error": 0.0312345678, "output_step": 0.1234567, "equal": False, "within_one_step": 0.97,
        "top1_agreement": 0.9972, "low": 0.984, "high": 0.9995, "parts_at": "fc",
        "operators": {"QLinearConv": 16, "Add": 2}, "float_operators": {},
        "integer_share": {"integer": 17, "total": 17, "share": 1.0, "float_layers": []},
        "accuracy": 0.96388888, "samples": 360,
    }  # fmt: skip
    text = " ".join(printed(load_check_view(found, "accuracy", "fraction"), 200).split())
    assert text.startswith("The artifact loads into the original architecture; the ONNX file comes near it, yet is not")
    assert "accuracy 96.4 % on 360 test samples, as in the summary" in text
    assert "same answer for 99.7 % [98.4, 100.0], 360 samples" in text and "QLinearConv 16, Add 2" in text
    assert "equal within the limits of int8 no" in text and "0.03123 " in text
    assert not any(sign in text for sign in ("{", "False", "agrees", "0.031234"))
    alike = {"relative_difference": 2.123e-7, "tolerance": 1e-4, "n": 9, "mse": 0.123456, "samples": 9}
    text = " ".join(printed(load_check_view(alike, "mse", "squared units"), 200).split())
    assert "the ONNX file agrees with it" in text and "0.123 squared units on 9" in text and "2.1e-07" in text


def test_a_dry_run_says_what_each_step_leaves_and_takes(records):
    step = {"name": "prune", "title": "Remove half", "plans": list(records[1].plans), "seconds": 31.0}
    text = printed(dry_run_view([{**step, "memory_bytes": 14_000_000, "parameters": 148_000, "macs": 9_460_000}]), 120)
    assert "1 prune  Remove half" in text and "64 → 32 channels" in text
    assert "leaves 148 k parameters, 9.46 M MACs, trains for about 31 s, needs about 14.0 MB" in text


def test_the_layer_table_gives_shares_that_add_up(records):
    text = printed(layer_view(records[0].layers), 100)
    line = next(line for line in text.splitlines() if "blocks.3.conv2" in line)
    assert line.split() == [
        "blocks.3.conv2",
        "Conv2d",
        "128×128×3×3",
        "147",
        "k",
        "24.9",
        "%",
        "9.44",
        "M",
        "25.0",
        "%",
    ]


def test_a_layer_with_keys_missing_is_shown_with_dashes():
    elsewhere = {"path": "<elsewhere>", "type": "products", "shape": None, "parameters": 0, "macs": 12.0}
    text = printed(layer_view([{"path": ""}, elsewhere]))
    assert "<model>" in text and "<elsewhere>" in text and "–" in text


def test_the_redundancy_table_leaves_out_layers_without_weights():
    row = {
        "path": "fc",
        "near_zero": 0.125,
        "zeros": 0.0,
        "dead_channels": 2,
        "channels": 64,
        "rank_95": 41,
        "full_rank": 64,
    }
    text = printed(redundancy_view([row, {"path": "norm"}]))
    assert "12.5 %" in text and "2 of 64" in text and "41 of 64" in text and "norm" not in text


def test_an_inspection_shows_totals_layers_redundancy_and_groups(records):
    totals = {
        "parameters": {"value": 590_000, "unit": "parameters"},
        "state_bytes": {"value": 2_360_000, "unit": "bytes"},
    }
    layers = [{**layer, "near_zero": 0.1, "zeros": 0.0} for layer in records[0].layers]
    text = printed(inspection_view({"totals": totals, "layers": layers, "groups": ["64 channels: stem"]}))
    assert "0.59 M" in text and "2.36 MB" in text and "near zero" in text and "64 channels: stem" in text
    assert "near zero" not in printed(inspection_view({"totals": totals, "layers": records[0].layers, "groups": []}))


def test_the_int8_file_is_held_against_pytorch_in_answers_and_in_steps(summary):
    agreed = {"value": 0.9972, "unit": "fraction", "low": 0.984, "high": 0.9995, "n": 360}
    assert agreement_line(summary) == ""
    summary["final"]["measurements"]["onnx_agreement"] = agreed
    line = agreement_line(summary)
    assert line == "the ONNX file and its PyTorch model: same answer for 99.7 % [98.4, 100.0] of 360 test samples"
    summary["final"]["facts"]["onnx"]["within_one_step"] = 0.9984
    assert agreement_line(summary) == f"{line}; 99.8 % of its outputs at most one step apart"
