"""The page: whole, self-contained, honest, and safe against what models and users name their things."""

import copy
import re
from html.parser import HTMLParser

import pytest

from tersor.core.errors import ArtifactError
from tersor.core.record import Record
from tersor.report.html import render

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} $\\frac{ \x00 & [bold]'


class Page(HTMLParser):
    """What a browser's parser makes of the page: elements with attributes, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def steps_table(page: str) -> list[list[str]]:
    """The cells of the table step by step, as text."""
    table = re.search(r'<table id="steps".*?</table>', page, re.S)[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.S)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.S) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_the_verdict_stands_at_the_top_with_the_ratios(report):
    page = Page(report)
    assert "14.1× smaller; 1.8× faster at batch 1" in page.text
    top = page.text[: page.text.index("Step by step")]
    assert "14.1×" in top and "4.7×" in top and "[4.5, 5.0]" in top and "points of accuracy lost" in top


def test_the_table_has_the_original_each_step_and_the_final_model(report):
    head, *rows = steps_table(report)
    assert [row[0] for row in rows] == ["Original", "1 prune", "2 recover", "3 distill", "4 int8", "Final int8"]
    assert all(len(row) == len(head) for row in rows)
    by_name = dict(zip(head, rows[4], strict=True))
    assert by_name["Accuracy"] == "98.6 % [97.4, 99.4]"
    assert by_name["ONNX file"] == "148 kB" and by_name["Latency, batch 32"] == "1.12 ms [1.08, 1.19]"
    assert dict(zip(head, rows[0], strict=True))["Speed-up, batch 1"] == "–"


def test_nothing_is_loaded_from_elsewhere(report):
    page = Page(report)
    assert not page.all("script") and not page.all("iframe") and not page.all("img")
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    assert "@import" not in report and not re.search(r"url\((?!#)", report)


def test_ids_are_unique_and_every_reference_finds_its_target(report):
    page = Page(report)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {attributes["aria-labelledby"] for _, attributes in page.elements if "aria-labelledby" in attributes}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", report)) | set(re.findall(r'href="#([^"]+)"', report))
    assert wanted <= set(ids)


def test_plots_take_their_colours_from_the_page_and_describe_themselves(report):
    page = Page(report)
    plots = page.all("svg")
    assert len(plots) == 7, "accuracy against size and speed, latency, layers, three trainings"
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    colours = [a["style"] for _, a in page.elements if "style" in a and "var(--" in (a["style"] or "")]
    assert len(colours) > 50
    assert not re.search(r"#01020\d", report)


def test_headers_have_a_scope_and_headings_do_not_skip_a_level(report):
    page = Page(report)
    assert all(header.get("scope") in ("col", "row") for header in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))


def test_the_same_input_gives_the_same_page(summary, records):
    assert render(summary, records) == render(copy.deepcopy(summary), list(records))


def test_skips_are_grouped_by_reason(report):
    text = Page(report).text
    assert text.count("its channels are tied to the network's input by the residual addition") == 1
    assert "8 places" in text and "blocks.2.add" in text


def test_hostile_names_are_shown_and_never_run(summary, records):
    layers = tuple({**layer, "path": HOSTILE + str(n)} for n, layer in enumerate(records[0].layers))
    plan = {**records[1].plans[0], "method": HOSTILE, "skips": [{"place": HOSTILE, "reason": HOSTILE}]}
    changes = {"name": HOSTILE, "title": HOSTILE, "layers": layers, "plans": (plan,), "facts": {HOSTILE: HOSTILE}}
    hostile = [Record(**{**record.__dict__, **changes}) for record in records]
    for stage in (summary["baseline"], *summary["steps"], summary["final"]):
        stage |= {"name": HOSTILE, "title": HOSTILE, "facts": {HOSTILE: {HOSTILE: [HOSTILE]}}, "notes": [HOSTILE]}
        stage["skips"] = [{"place": HOSTILE, "reason": HOSTILE}]
    summary["task"] |= {"name": HOSTILE, "source": HOSTILE, "notes": [HOSTILE]}
    summary["recipe"] |= {"name": HOSTILE, "explanation": HOSTILE}
    summary["verdict"]["sentence"] = HOSTILE
    summary["environment"] = {HOSTILE: HOSTILE}
    summary["reproduce"]["command"] = HOSTILE
    summary["final"]["files"] = {"onnx": HOSTILE, "artifact": HOSTILE}
    page = Page(render(summary, hostile))
    assert not page.all("script") and not page.all("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "{{ 7*7 }}" in page.text and "<script>alert(1)</script>" in page.text


def strip_latency(summary, records):
    stages = [summary["baseline"], *summary["steps"], summary["final"]]
    for measurements in [stage["measurements"] for stage in stages]:
        for name in [n for n in measurements if "batch" in n]:
            del measurements[name]
    for ratios in (summary["ratios"], summary["ratio_intervals"]):
        del ratios["latency_batch_1"], ratios["latency_batch_32"]
    return summary, records


def strip_history_and_layers(summary, records):
    return summary, [Record(**{**record.__dict__, "history": (), "layers": ()}) for record in records]


def strip_records(summary, records):
    return summary, []


def strip_end(summary, records):
    summary["verdict"] = {"status": "failed", "sentence": "The loss became NaN in step 3.", "budgets": []}
    summary |= {"steps": summary["steps"][:2], "final": None, "ratios": {}, "ratio_intervals": {}}
    return summary, records[:3]


def strip_intervals(summary, records):
    summary["ratio_intervals"] = {}
    for stage in [summary["baseline"], *summary["steps"], summary["final"]]:
        for measurement in stage["measurements"].values():
            measurement |= {"low": None, "high": None, "n": None}
    return summary, records


def strip_everything(summary, records):
    keep = {key: summary[key] for key in ("schema", "tersor", "task", "recipe")}
    return {**keep, "verdict": {"status": "failed", "sentence": "Nothing has finished."}}, []


def odd_history(summary, records):
    history = ({"epoch": 1, "loss": float("nan")}, {"epoch": 2, "validation": None}, {"epoch": 3, "loss": 0.4}, {})
    layers = ({"path": "only", "type": "Linear"},)
    return summary, [Record(**{**record.__dict__, "history": history, "layers": layers}) for record in records]


@pytest.mark.parametrize(
    "strip",
    [strip_latency, strip_history_and_layers, strip_records, strip_end, strip_intervals, strip_everything, odd_history],
)
def test_a_page_with_pieces_missing_still_stands(summary, records, strip):
    page = Page(render(*strip(summary, records)))
    said = page.text.replace("session.run(None,", "")
    assert page.all("h1") and "None" not in said and "nan" not in said.split()


def test_columns_that_nothing_was_measured_for_are_left_out(summary, records):
    head, *_ = steps_table(render(*strip_latency(summary, records)))
    assert "Accuracy" in head and not any("atency" in cell or "Speed" in cell for cell in head)


def test_a_metric_that_is_no_fraction_keeps_its_unit(summary, records):
    summary["task"] |= {"metric": "mean_squared_error", "metric_unit": "squared units", "higher_is_better": False}
    for stage in [summary["baseline"], *summary["steps"], summary["final"]]:
        measured = {"value": 0.0123, "unit": "squared units", "low": 0.011, "high": 0.014}
        stage["measurements"]["mean_squared_error"] = {**stage["measurements"].pop("accuracy"), **measured}
    page = render(summary, records)
    assert (
        dict(zip(*steps_table(page)[:2], strict=True))["Mean squared error"] == "0.0123 squared units [0.0110, 0.0140]"
    )
    assert "lower is better" in page


def test_a_model_of_a_hundred_layers_shows_the_largest_and_says_so(summary, records):
    layers = tuple(
        {"path": f"layers.{n}", "type": "Linear", "shape": [n, n], "parameters": n * n, "nonzeros": n, "macs": n * n}
        for n in range(1, 101)
    )
    wide = [Record(**{**record.__dict__, "layers": layers}) for record in records]
    assert "72 smaller ones are in the table below" in render(summary, wide)


def test_a_summary_that_breaks_its_schema_is_refused(summary, records):
    del summary["verdict"]
    with pytest.raises(ArtifactError, match="verdict"):
        render(summary, records)


def contrast(first: str, second: str) -> float:
    """WCAG 2's contrast ratio of two #rrggbb colours."""

    def light(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(first), light(second)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_text_and_marks_stand_out_in_light_dark_and_print(report):
    schemes = [
        dict(re.findall(r"(--[\w-]+): ?(#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", report, re.S)
    ]
    assert len(schemes) == 3
    for colours in schemes:
        wide = {
            name: value if len(value) == 7 else "#" + "".join(2 * c for c in value[1:])
            for name, value in colours.items()
        }
        for ground in ("--page", "--panel"):
            for text in ("--ink", "--muted", "--good", "--bad", "--after"):
                assert contrast(wide[text], wide[ground]) >= 4.5, (text, ground, wide)
            for mark in ("--before", "--accent"):
                assert contrast(wide[mark], wide[ground]) >= 2.6, (mark, ground, wide)
