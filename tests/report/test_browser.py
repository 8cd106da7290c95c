"""The page in a real browser: no error, plots drawn, rows there, and no sideways scrolling on a phone."""

import html
import json
import re
import shutil
import subprocess

import pytest

from tersor.core.record import Record
from tersor.report.evaluation import evaluation_document
from tersor.report.html import render
from tersor.report.roofline import fits_sections, parse_fits
from tersor.report.speed import benchmark_document

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

# Runs first in the page under test; after loading it tells the page around it what it sees.
PROBE = """<script>
const errors = [];
addEventListener("error", event => errors.push(String(event.message || event.target.tagName)), true);
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(each => each.open = true);
  const root = document.documentElement;
  const drawn = [...document.querySelectorAll("svg.plot")].map(svg => {
    const shapes = [...svg.querySelectorAll("path, use, text")].filter(s => s.getBoundingClientRect().width > 0);
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect());
    const beyond = texts.filter(t => t.left < box.left - 2 || t.right > box.right + 2).length;
    return {width: box.width, height: box.height, shapes: shapes.length, beyond};
  });
  const rows = [...document.querySelectorAll("#steps tbody tr")].map(row => row.cells[0].innerText.trim());
  const cut = [...document.querySelectorAll("#steps")].map(each => each.scrollWidth - each.parentElement.clientWidth);
  const tops = [...document.querySelectorAll(".figures dt")].map(each => Math.round(each.getBoundingClientRect().top));
  parent.postMessage({
    width: innerWidth, cut, tops, scroll: root.scrollWidth, errors, drawn, rows,
    requests: performance.getEntriesByType("resource").map(each => each.name),
    font: getComputedStyle(document.querySelector("svg.plot text") || root).fontFamily,
    ink: getComputedStyle(document.body).color,
  }, "*");
});
</script>"""
FRAME = """<body><pre id="told"></pre><script>
const told = [];
addEventListener("message", event => {
  told.push(event.data);
  document.getElementById("told").textContent = JSON.stringify(told);
});
</script>%s</body>"""


def look(folder, page, widths):
    """What the page reports of itself in frames of the given widths; the browser's console must stay empty."""
    (folder / "page.html").write_text(page.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="width:{width}px;height:3000px;border:0"></iframe>' for width in widths
    )
    (folder / "frame.html").write_text(FRAME % frames, encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000",
        "--window-size=1700,1200", "--dump-dom", (folder / "frame.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    told = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.S)[1]) or "[]")
    assert len(told) == len(widths), f"{len(told)} of {len(widths)} frames reported: {done.stderr[-1000:]}"
    return {each["width"]: each for each in told}


def test_the_page_stands_in_a_browser_wide_and_narrow(tmp_path, report):
    seen = look(tmp_path, report, (375, 1280))
    for width in (375, 1280):
        page = seen[width]
        assert page["errors"] == [] and page["requests"] == []
        assert page["scroll"] <= width, "no sideways scrolling"
        assert page["rows"] == ["Original", "1 prune", "2 recover", "3 distill", "4 int8", "Final\nint8"]
        assert len(page["drawn"]) == 7
        for plot in page["drawn"]:
            assert plot["width"] > 280 and plot["height"] > 80 and plot["shapes"] > 8
            assert plot["beyond"] == 0, "no label is cut off"
        assert "system-ui" in page["font"], "plots speak in the page's own type"


def test_the_steps_fit_a_window_and_the_figures_labels_stand_on_one_line(tmp_path, report):
    for width, page in look(tmp_path, report, (1100, 1280)).items():
        assert len(page["cut"]) == 1 and page["cut"][0] <= 0, f"{width} pixels hold the table"
        assert len(page["tops"]) == 4 and len(set(page["tops"])) == 1, page["tops"]


def test_long_and_hostile_names_neither_run_nor_widen_the_page(tmp_path, summary, records):
    name = "<script>console.error('ran')</script>" + "very_long_module_name" * 12
    layers = tuple({**layer, "path": f"{name}.{n}"} for n, layer in enumerate(records[0].layers))
    records = [Record(**{**record.__dict__, "layers": layers}) for record in records]
    for stage in summary["steps"]:
        stage |= {"title": name, "notes": [name], "skips": [{"place": name, "reason": name}], "facts": {name: name}}
    summary["task"]["name"] = summary["verdict"]["sentence"] = summary["reproduce"]["command"] = name
    summary["environment"]["platform"] = name
    page = look(tmp_path, render(summary, records), (375,))[375]
    assert page["errors"] == [] and page["scroll"] <= 375
    assert all(plot["beyond"] == 0 for plot in page["drawn"])


def test_an_evaluation_stands_in_a_browser_with_its_pictures(tmp_path, evaluation):
    page = evaluation_document(evaluation("very_long_class_name" * 9)).html()
    assert "<img" in page
    seen = look(tmp_path, page, (375, 1280))
    for width in (375, 1280):
        assert seen[width]["errors"] == [], "a picture that cannot be decoded is an error too"
        assert seen[width]["scroll"] <= width, "no sideways scrolling"
        assert len(seen[width]["drawn"]) == 8 and all(plot["beyond"] == 0 for plot in seen[width]["drawn"])


def test_a_benchmark_with_rooflines_stands_in_a_browser(tmp_path, benchmark_numbers, fits_numbers):
    page = benchmark_document(benchmark_numbers(), fits_sections(parse_fits(fits_numbers))).html()
    seen = look(tmp_path, page, (375,))[375]
    assert seen["errors"] == [] and seen["scroll"] <= 375
    assert len(seen["drawn"]) == 3 and all(plot["beyond"] == 0 for plot in seen["drawn"])


def test_an_unfinished_run_stands_in_a_browser(tmp_path, summary):
    summary = {**summary, "verdict": {"status": "failed", "sentence": "Nothing has finished.", "budgets": []}}
    summary |= {"baseline": None, "steps": [], "final": None, "ratios": {}, "ratio_intervals": {}}
    page = look(tmp_path, render(summary, []), (375,))[375]
    assert page["errors"] == [] and page["rows"] == [] and page["scroll"] <= 375
