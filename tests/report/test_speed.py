"""Pages of a benchmark and of what fits where: the verdicts as they were made, outliers told, layers under the roof."""

import json
import re

import pytest

from tersor.core.errors import ArtifactError
from tersor.report.roofline import fits_document, parse_fits
from tersor.report.speed import benchmark_document
from tersor.report.write import write_reports


def visible(page):
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split()).replace("\u00a0", " ")


def test_a_benchmark_says_who_is_faster_and_how_the_times_are_spread(benchmark_numbers):
    page = benchmark_document(benchmark_numbers()).html()
    text = visible(page)
    assert (
        "Against big: small at batch 1, 1 thread: faster by 2.0× (1.8–2.2); small at batch 32, 1 thread: too noisy to "
        "tell." in text
    )
    assert (
        "2.0× [1.8, 2.2]" in text
        and "Up to 10.0 % of the calls took far longer" in text
        and "the slowest 90 ms" in text
    )
    assert "small, batch 1, 1 thread 4.00 ms [3.60, 4.40]" in text and "1.00 MB" in text
    spread = re.search(r'aria-label="(How the times are spread[^"]*)"', page)[1]
    assert "small, batch 1, 1 thread: median 4.00 ms, 99 % 8.00 ms" in spread


def test_a_ratio_whose_interval_is_wide_is_no_headline(benchmark_numbers):
    shown = {figure.label: figure for figure in benchmark_document(benchmark_numbers()).figures}
    assert shown["as fast, small, batch 1, 1 thread"].value == "2.0×"
    assert shown["as fast, small, batch 32, 1 thread"].value == "[0.8, 4.0]"


def test_a_headline_counts_what_it_leaves_out(benchmark_numbers):
    found = benchmark_numbers()
    one = found.comparisons[0]
    many = found.model_copy(update={"comparisons": (one,) * 5})
    assert benchmark_document(many).headline.endswith("faster by 2.0× (1.8–2.2); 2 more below.")


def test_energy_has_a_column_only_where_it_was_measured(benchmark_numbers):
    assert "Energy" not in benchmark_document(benchmark_numbers()).html()
    found = benchmark_numbers(energy=0.02)
    assert "Energy" in benchmark_document(found).html() and "0.0200 J" in visible(benchmark_document(found).html())


def test_layers_stand_under_the_roof_by_what_bounds_them(fits_numbers):
    page = fits_document(parse_fits(fits_numbers)).html()
    text = visible(page)
    assert "Small chip: does not fit (2.0× its memory), at least 3.00 ms a pass." in text
    assert "Small chip: would fit in int8 with 50 % of its channels (75 % of the weights gone)" in text
    assert "Small chip: 25.0 % of the time goes to layers that wait for memory" in text and "clocks fall" in text
    first, second = re.findall(r'<tr><th scope="row">(\w+)</th>', page[page.index("What helps") :])
    assert (first, second) == ("conv", "fc"), "the longest first"
    assert "fc: 2 a byte, memory; conv: 100 a byte, compute" in page


def test_what_is_read_is_not_called_measured(fits_numbers):
    text = visible(fits_document(parse_fits(fits_numbers)).html())
    assert "What was read" in text and "measured, and why" not in text and "How it was measured" not in text


def test_a_decoders_cache_has_a_column(fits_numbers):
    assert "Cache" not in visible(fits_document(parse_fits(fits_numbers)).html())
    row = fits_numbers["devices"][0]["fits"][0]
    row |= {"cache": {**row["weights"], "value": 7e6}, "token_latency": {**row["latency"], "value": 0.5}}
    text = visible(fits_document(parse_fits(fits_numbers)).html())
    assert "Activations Cache Time, at least A token, at least" in text and "1.00 MB 7.00 MB 3.00 ms 0.500 ms" in text


def test_without_a_roof_there_is_the_table_alone(fits_numbers):
    page = fits_document(parse_fits({**fits_numbers, "rooflines": {}})).html()
    assert "<svg" not in page.replace('rel="icon"', "") and "What helps" in page


def test_a_damaged_file_is_named_with_the_place(fits_numbers, tmp_path):
    fits_numbers["devices"][0]["layers"][1]["bound"] = "luck"
    (tmp_path / "fits.json").write_text(json.dumps(fits_numbers))
    with pytest.raises(ArtifactError, match=r"fits\.json, at devices\.0\.layers\.1\.bound"):
        write_reports(tmp_path)


def test_an_evaluation_takes_in_what_was_measured_of_speed_and_devices(
    tmp_path, evaluation, benchmark_numbers, fits_numbers
):
    for name, data in (
        ("evaluation", evaluation().to_json()), ("benchmark", benchmark_numbers().to_json()), ("fits", fits_numbers),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    (path,) = write_reports(tmp_path, ("md",))
    text = path.read_text(encoding="utf-8")
    assert path.name == "evaluation.md"
    for heading in ("The limits", "Speed", "Bytes, memory, start", "What fits where", "What bounds each layer"):
        assert f"## {heading}\n" in text
    paths = [write_reports(tmp_path, ("csv",), of=of)[0].name for of in ("benchmark", "fits")]
    assert paths == ["benchmark.csv", "fits.csv"]
    table = (tmp_path / "benchmark.csv").read_text(encoding="utf-8")
    assert "comparisons/big small 1 1/speedup,2.0,×,1.8,2.2" in table
