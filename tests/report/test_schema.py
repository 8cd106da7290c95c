"""The summary's schema: what it takes, what it refuses, and its page."""

import copy
import json
from pathlib import Path

import pytest

from tersor.core.errors import ArtifactError
from tersor.core.measurement import Measurement
from tersor.report.schema import parse_summary
from tersor.report.schema_page import rewrite, tables

PAGE = Path(__file__).parents[2] / "docs" / "summary-schema.md"


def test_a_summary_read_and_written_again_is_the_same(summary):
    summary["recipe"]["steps"] = [{"title": "", **step} for step in summary["recipe"]["steps"]]
    written = json.loads(json.dumps(parse_summary(summary).to_json(), allow_nan=False))
    assert written == json.loads(json.dumps(summary))


def test_measurements_come_back_as_the_core_noun(summary):
    final = parse_summary(summary).final
    assert isinstance(final.measurements["accuracy"], Measurement) and final.measurements["accuracy"].n == 360


def test_what_is_left_out_is_written_as_null_or_empty(summary):
    for key in ("baseline", "steps", "final", "ratios", "ratio_intervals", "environment", "reproduce", "seconds"):
        del summary[key]
    written = parse_summary(summary).to_json()
    assert written["baseline"] is None and written["final"] is None and written["steps"] == []
    assert written["reproduce"] == {"command": "", "seed": None, "base_sha256": None}


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("verdict", "status"), "fine", "verdict.status"),
        (("steps", 1, "measurements", "accuracy", "value"), "high", "steps.1.measurements.accuracy.value"),
        (("baseline", "colour"), "red", "baseline.colour"),
        (("task", "samples", "test"), -1, "task.samples.test"),
        (("ratios", "size"), float("nan"), "ratios.size"),
    ],
)
def test_what_breaks_the_schema_is_named_by_its_path(summary, path, value, told):
    broken = copy.deepcopy(summary)
    *way, last = path
    place = broken
    for key in way:
        place = place[key]
    place[last] = value
    with pytest.raises(ArtifactError, match=told.replace(".", r"\.")):
        parse_summary(broken)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(summary, version):
    with pytest.raises(ArtifactError, match="another version"):
        parse_summary({**summary, "schema": version})


def test_the_page_holds_the_tables_of_todays_schema():
    page = PAGE.read_text(encoding="utf-8")
    assert rewrite(page) == page, "run: python -m tersor.report.schema_page docs/summary-schema.md"
    assert tables() in page


def test_the_page_names_every_measurement_of_a_real_run(summary):
    page = PAGE.read_text(encoding="utf-8")
    for name in summary["final"]["measurements"]:
        assert f"`{name}`" in page or name == "validation_accuracy"
