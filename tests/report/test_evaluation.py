"""Reports of an evaluation and a benchmark: the verdict first, every number as measured, safe against hostile names."""

import base64
import csv
import io
import json
import re
import struct
import zlib

import numpy as np
import pytest

from tersor.core.errors import ArtifactError, InputError
from tersor.core.measurement import Measurement
from tersor.measure.behaviour import schema as parts
from tersor.report.behaviour.gate import headline
from tersor.report.behaviour.robustness import robustness_section
from tersor.report.card import card
from tersor.report.flat import csv_of
from tersor.report.picture import picture_uri
from tersor.report.schema import parse_summary
from tersor.report.write import write_reports

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} | [x](y) `z` \x00'
PIXELS = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)  # as the evaluation's picture has them


@pytest.fixture(scope="module")
def written(tmp_path_factory, evaluation):
    """Every format of one evaluation, as text by format."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "evaluation.json").write_text(json.dumps(evaluation().to_json()))
    paths = write_reports(folder, ("html", "md", "json", "csv"))
    assert [path.name for path in paths] == [f"evaluation.{kind}" for kind in ("html", "md", "json", "csv")]
    return {path.suffix[1:]: path.read_text(encoding="utf-8") for path in paths}


def visible(page):
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.S)).split())


def test_the_verdict_and_what_broke_it_stand_before_everything_else(written):
    text = visible(written["html"])
    top = text[: text.index("The limits")]
    assert "× Failed" in top and "The two give the same answer on 93.0" in top and "at least 97.0" in top
    assert "fell by" not in top, "a limit that is open did not decide"
    assert "points of accuracy lost 1.5 [0.5, 2.5]" in top


def test_each_part_says_what_it_means_and_what_was_measured(written):
    text = visible(written["html"]).replace("\u00a0", " ")
    for said in (
        "Loss of accuracy: about 1,600 samples would tell; there are 400",
        "90.0 % [87.0, 93.0] 88.5 % [85.0, 91.0] −1.5 points [−2.5, −0.5]",
        "13 samples turned wrong and 7 turned right", "probability 0.190",
        "cow by 20.0 points [15.0, 25.0]", "cat taken for dog 5 15 +10", "now: dog, 93 %", "sample 17",
        "The calibration error rose by 0.030 [0.010, 0.050]: more than chance explains", "after temperature scaling",
        "PGD 8/255, made against big cat",
        "these lose more than all others, by more than chance explains: cat by 3.0 points",
        "Dashed: the limit, which is on the loss of accuracy over all, not of single classes",
        "Sex: 3 samples have no value", "On data from elsewhere", "attacks on small: an ONNX file gives no gradients",
        "12 samples are few",
    ):  # fmt: skip
        assert said in text, said
    assert written["html"].count('<svg class="plot"') == 8 and written["html"].count("<figcaption>") == 8


def test_what_sums_of_floats_leave_over_is_no_loss(evaluation):
    found = evaluation()
    drop = Measurement(1e-15, "percentage points", -0.8, 0.8, 50)
    mean = parts.Condition(name="mean", severity=0, drop=drop)
    found = found.model_copy(update={"robustness": found.robustness.model_copy(update={"samples": 50, "mean": mean})})
    said = robustness_section(found).says
    assert said[0].startswith("Over all corruptions of 50 samples") and "accuracy changed by 0.0" in said[0]
    assert "chance" not in said[0]


@pytest.mark.parametrize(("low", "chance"), [(-0.1, ", which may be chance."), (0.1, ".")])
def test_a_headline_says_what_may_be_chance(evaluation, low, chance):
    drop = Measurement(0.6, "percentage points", low, 1.3, 400)
    found = evaluation(gate=parts.Gate(status="nothing asked", sentence="no limit was asked for"))
    found = found.model_copy(update={"quality": found.quality.model_copy(update={"drop": drop})})
    assert headline(found).endswith(f"accuracy fell by 0.6 points [{low}, 1.3]{chance}".replace("-", "−"))


def test_the_picture_is_a_png_of_exactly_the_pixels(written):
    uri = re.search(r'src="data:image/png;base64,([^"]+)"', written["html"])[1]
    data = base64.b64decode(uri)
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == (2, 2)
    at, rows = 8, b""
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        content = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + content)
        rows += zlib.decompress(content) if kind == b"IDAT" else b""
        at += 12 + length
    stored = np.frombuffer(rows, np.uint8).reshape(2, 1 + 6)
    assert (stored[:, 0] == 0).all() and (stored[:, 1:].reshape(2, 2, 3) == PIXELS).all()


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [((2, 2, 3), "AAAA"), ((2, 6), None), ((10**6, 10**6, 3), ""), ((2, 2, 3), "%%%"), ((0, 2, 1), "")],
)
def test_pixels_that_do_not_fit_their_shape_are_refused(shape, pixels):
    encoded = base64.b64encode(PIXELS.tobytes()).decode() if pixels is None else pixels
    with pytest.raises(ArtifactError, match="do not fit its shape"):
        picture_uri(parts.Shown(kind="picture", shape=shape, pixels=encoded))


def test_the_csv_has_every_measurement_once_and_exactly(written):
    rows = list(csv.DictReader(io.StringIO(written["csv"])))
    found = {row["what"]: row for row in rows}
    assert len(found) == len(rows), "names tell them apart"
    assert len(rows) == json.dumps(json.loads(written["json"])).count('"unit":')
    drop = found["quality/per_class/cow/drop"]
    assert (float(drop["value"]), float(drop["low"]), drop["unit"]) == (20.0, 15.0, "percentage points")
    assert float(found["robustness/corruptions/blur 5/compressed"]["value"]) == 0.8 - 0.5
    assert found["robustness/attacks/pgd 0.0313725 big cat/original"]["low"] == "0.6"


def test_an_end_that_is_not_known_is_empty_in_the_csv():
    text = csv_of({"a": Measurement(1.0, "ms").to_json()})
    assert text.splitlines()[1] == "a,1.0,ms,,,,cpu,{}"


def test_markdown_has_the_sentences_and_the_tables(written):
    lines = written["md"].splitlines()
    assert lines[0] == "# small beside big cat" and lines[2].startswith("**Failed.** The two give the same answer")
    assert "| Same answers | at least 97.0 % | 93.0 % [91.0, 95.0] | broken |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) > 30 and "* cat: was: cat, 81 %; now: dog, 93 %; sample 17" in lines


def test_hostile_names_stay_text(tmp_path, evaluation):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation(HOSTILE).to_json()))
    page, markdown = (path.read_text(encoding="utf-8") for path in write_reports(tmp_path, ("html", "md")))
    assert "<script" not in page and "<img src=x" not in page and "49" not in re.findall(r">\s*49\s*<", page)
    assert "<script" not in markdown and "<img" not in markdown and "](y)" not in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "taken for" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows), "a name adds no column"


def test_an_evaluation_without_targets_has_the_parts_that_are_left(tmp_path, evaluation):
    found = evaluation(
        quality=None, calibration=None, fairness=(), outside={}, robustness=None,
        flips=parts.Flips(measurements={"changed": Measurement(0.07, "fraction", 0.05, 0.09)}),
        gate=parts.Gate(status="nothing asked", sentence="no limit was asked for"),
    )  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(found.to_json()))
    page = visible(write_reports(tmp_path)[0].read_text(encoding="utf-8"))
    assert "No limit was asked" in page and "Same answers, changed answers" in page
    assert "Whether confidence can be believed" not in page and "Groups of people" not in page


def test_numbers_and_tokens_are_told_in_their_own_words(tmp_path, evaluation):
    flip = parts.Flip(sample=3, severity=2.5, input=parts.Shown(kind="numbers", shape=(40,), numbers=(0.5,) * 40))
    found = evaluation(
        data=parts.DataFacts(name="prices", kind="numbers", samples=400, rows=400, labelled=True, metric="mse",
                             metric_unit="", higher_is_better=False),
        agreement={"rms_difference": Measurement(0.2, "output units", 0.1, 0.3)}, calibration=None, fairness=(),
        quality=parts.Quality(
            original=Measurement(2, "mse", 1, 3), compressed=Measurement(3, "mse", 2, 4),
            drop=Measurement(1, "mse", 0.5, 1.5),
            more={"original_rmse": Measurement(1.4, "u", 1, 2), "compressed_rmse": Measurement(1.7, "u", 1, 2)},
        ),
        flips=parts.Flips(worst=(flip,)), gate=parts.Gate(status="nothing asked", sentence="…"), robustness=None,
    )  # fmt: skip
    assert "mse rose by 1.00 mse [0.50, 1.50]" in headline(found)
    (tmp_path / "evaluation.json").write_text(json.dumps(found.to_json()))
    page = visible(write_reports(tmp_path)[0].read_text(encoding="utf-8"))
    assert "squared error up by 2.5" in page and "numbers: 0.5, 0.5" in page and "…" in page and "RMSE" in page


def test_the_card_repeats_what_the_evaluation_says_and_says_so_where_there_is_none(summary, evaluation):
    run = parse_summary(summary)
    alone = card(run)
    for said in (
        "# digits, compressed", "## Intended use", "training: 1,150 samples", "1. Remove half of the channels",
        "| Accuracy | 98.9 % [97.7, 99.7] | 98.6 % [97.4, 99.4] |", "## Limits", "seed: 0", "Not evaluated",
    ):  # fmt: skip
        assert said in alone, said
    assert "Not evaluated" not in card(run, evaluation()) and "Failed: The two give" in card(run, evaluation())


@pytest.fixture
def run_folder(tmp_path, summary, records):
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(each.to_json()) + "\n" for each in records))
    (tmp_path / "model").mkdir()
    return tmp_path


def test_a_run_takes_in_what_was_evaluated_in_its_folder(run_folder, evaluation):
    write_reports(run_folder, ("json",))
    assert "Not evaluated" in (run_folder / "model" / "card.md").read_text()
    (run_folder / "evaluation.json").write_text(json.dumps(evaluation().to_json()))
    paths = write_reports(run_folder, ("html", "md", "csv"))
    page, markdown, table = (path.read_text(encoding="utf-8") for path in paths)
    assert "Behaviour against the original" in page and page.count('<svg class="plot"') == 7 + 8
    assert len(re.findall(r'\bid="([^"]+)"', page)) == len(set(re.findall(r'\bid="([^"]+)"', page))), "ids are unique"
    assert "## Step by step" in markdown and "13 samples turned wrong" in markdown
    assert "evaluation/quality/drop" in table and "summary/steps/1 prune/measurements/accuracy" in table
    assert "13 samples turned wrong" in (run_folder / "model" / "card.md").read_text()


def test_folders_and_formats_that_give_no_report_are_named(tmp_path):
    with pytest.raises(ArtifactError, match="there are no numbers to report"):
        write_reports(tmp_path)
    with pytest.raises(InputError, match=r"unknown format.*pdf"):
        write_reports(tmp_path, ("html", "pdf"))
    (tmp_path / "evaluation.json").write_text('{"schema": 1, "tersor": 3}')
    with pytest.raises(ArtifactError, match="does not follow its schema"):
        write_reports(tmp_path)
    (tmp_path / "evaluation.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match=r"evaluation\.json is not JSON"):
        write_reports(tmp_path)
