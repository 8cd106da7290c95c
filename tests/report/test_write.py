"""A run's folder in, report.html out."""

import json

import pytest

from tersor.core.errors import ArtifactError
from tersor.report.write import write_report


@pytest.fixture
def folder(tmp_path, summary, records):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps(record.to_json()) + "\n" for record in records]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    return tmp_path


def test_the_report_is_written_beside_the_summary_and_nothing_is_left(folder):
    path = write_report(folder)
    assert path == folder / "report.html" and "Training: distill" in path.read_text(encoding="utf-8")
    assert sorted(p.name for p in folder.iterdir()) == ["records.jsonl", "report.html", "summary.json"]


def test_a_torn_last_line_is_left_out(folder):
    whole = (folder / "records.jsonl").read_bytes()
    (folder / "records.jsonl").write_bytes(whole[:-40])
    page = write_report(folder).read_text(encoding="utf-8")
    assert "Training: distill" in page and "Training: int8" not in page


def test_a_folder_without_records_still_gets_its_report(folder):
    (folder / "records.jsonl").unlink()
    assert "Step by step" in write_report(folder).read_text(encoding="utf-8")


def test_a_damaged_line_in_the_middle_is_an_error(folder):
    lines = (folder / "records.jsonl").read_text().splitlines(keepends=True)
    lines[1] = '{"number": 1\n'
    (folder / "records.jsonl").write_text("".join(lines))
    with pytest.raises(ArtifactError, match="a record cannot be read"):
        write_report(folder)


def test_a_missing_summary_says_what_to_do(tmp_path):
    with pytest.raises(ArtifactError, match=r"there is no summary.*tersor resume"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ["", '{"schema": 1, ', "[]", '{"schema": 1, "seconds": NaN}', "\udcff"])
def test_a_damaged_summary_is_an_error_and_the_old_report_stays(folder, text):
    (folder / "report.html").write_bytes(b"old")
    (folder / "summary.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == b"old"
