"""A folder's numbers in, reports out: of a run, evaluation, benchmark or what fits, as HTML, Markdown and CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, final

from tersor.core.errors import ArtifactError, InputError
from tersor.core.files import write_atomically
from tersor.core.record import Record
from tersor.measure.behaviour.schema import Evaluation, parse_evaluation
from tersor.measure.benchmark_schema import Benchmark, parse_benchmark
from tersor.report.behaviour.gate import STATUS, headline
from tersor.report.card import card
from tersor.report.evaluation import behaviour_sections, evaluation_document
from tersor.report.flat import csv_of
from tersor.report.html import render
from tersor.report.markdown import document_markdown, run_markdown
from tersor.report.page import Document, Section
from tersor.report.roofline import Fits, fits_document, fits_sections, parse_fits
from tersor.report.schema import Summary, parse_summary
from tersor.report.speed import benchmark_document, benchmark_sections

Parsed = TypeVar("Parsed")
CARD = "card.md"
FORMATS = ("html", "md", "json", "csv")
Of = Literal["run", "evaluation", "benchmark", "fits"]
_NAMES = {"run": "report", "evaluation": "evaluation", "benchmark": "benchmark", "fits": "fits"}  # of what is written


def write_report(folder: Path) -> Path:
    """Rebuild ``report.html`` from what lies in a run's folder; returns its path.

    ``summary.json`` and ``records.jsonl``, and where they are there ``evaluation.json`` and ``benchmark.json`` of its
    model. A torn last line of the records (the machine stopped while it was written) is left out. Raises ArtifactError
    where the summary is missing, damaged or of another version.
    """
    return write_reports(folder, of="run")[0]


def write_reports(folder: Path, formats: Sequence[str] = ("html",), of: Of | None = None) -> tuple[Path, ...]:
    """Report what lies in a folder: a run as ``report.html`` …, else an evaluation, a benchmark, or what fits.

    Each report takes in what else lies there of its models; with a run's its model card (``model/card.md``) is written.
    ``formats``: of ``FORMATS``; "json" writes nothing, the numbers lie there. ``of``: which report it shall be. Returns
    the paths. Raises InputError for an unknown format, ArtifactError for a folder without numbers and for damaged ones.
    """
    expect_formats(formats)
    found = Found.read(folder)
    of = of or found.first
    if of is None:
        raise ArtifactError(
            "there are no numbers to report", where=str(folder),
            got="none of summary.json, evaluation.json, benchmark.json, fits.json",
            expected="the folder of a finished run, or where tersor evaluate, benchmark or fits wrote (-o)",
            do=f"Finish the run first: tersor resume {folder}; or name the other folder",
        )  # fmt: skip
    numbers = "summary.json" if of == "run" else f"{of}.json"
    if of == "run" and (folder / "model").is_dir():
        _write(folder / "model" / CARD, model_card(found))
    made = {"run": _run, "evaluation": _evaluation, "benchmark": _benchmark, "fits": _fits}[of](found, folder)
    return tuple(
        folder / numbers if kind == "json" else _write(folder / f"{_NAMES[of]}.{kind}", made[kind]())
        for kind in dict.fromkeys(formats)
    )


def model_card(found: Found) -> str:
    """The model card of a run, with what an evaluation in its folder says."""
    assert found.summary is not None, "it is a run's"
    return card(found.summary, found.evaluation, found.behaviour)


def expect_formats(formats: Sequence[str]) -> None:
    """Raises InputError for a format that is none."""
    unknown = [each for each in formats if each not in FORMATS]
    if unknown or not formats:
        got = ", ".join(unknown) or "none"
        raise InputError("unknown format", where="--format", got=got, expected=f"some of {', '.join(FORMATS)}")


@final
@dataclass(frozen=True, eq=False)
class Found:
    """The numbers that lie in a folder; None where a file is not there."""

    summary: Summary | None = None
    records: Sequence[Record] = ()
    evaluation: Evaluation | None = None
    benchmark: Benchmark | None = None
    fits: Fits | None = None

    @classmethod
    def read(cls, folder: Path) -> Found:
        """Raises ArtifactError for what is damaged or of another version."""
        summary = _read(folder / "summary.json", parse_summary, f"Rebuild it: tersor resume {folder}")
        evaluation = _read(folder / "evaluation.json", parse_evaluation, "Evaluate again: tersor evaluate")
        benchmark = _read(folder / "benchmark.json", parse_benchmark, "Measure again: tersor benchmark")
        fits = _read(folder / "fits.json", parse_fits, "Ask again: tersor fits")
        records = _read_records(folder / "records.jsonl") if summary is not None else ()
        return cls(summary, records, evaluation, benchmark, fits)

    @property
    def first(self) -> Of | None:
        """What a report of the folder is about; None where there is nothing."""
        present: dict[Of, object] = {
            "run": self.summary, "evaluation": self.evaluation, "benchmark": self.benchmark, "fits": self.fits
        }  # fmt: skip
        return next((of for of, numbers in present.items() if numbers is not None), None)

    @property
    def measured(self) -> tuple[Section, ...]:
        """What else was measured of the models than their behaviour."""
        speed = () if self.benchmark is None else benchmark_sections(self.benchmark)
        return (*speed, *(() if self.fits is None else fits_sections(self.fits)))

    @cached_property
    def behaviour(self) -> tuple[Section, ...]:
        """What an evaluation in a run's folder says, under a heading that says whose it is."""
        found = self.evaluation
        if found is None:
            return ()
        meaning = (
            f"{found.compressed.name} beside {found.original.name} on {found.data.samples:,} samples of "
            f"{found.data.name}, as tersor evaluate found them."
        )
        says = (f"{STATUS[found.gate.status]}: {headline(found)}", *found.notes)
        return Section("behaviour", "Behaviour against the original", meaning, says), *behaviour_sections(found)

    def to_json(self) -> dict[str, Any]:
        """All that lies there, each under its name."""
        parts = {"summary": self.summary, "evaluation": self.evaluation, "benchmark": self.benchmark, "fits": self.fits}
        return {name: part.model_dump(mode="json", by_alias=True) for name, part in parts.items() if part is not None}


Made = Mapping[str, Callable[[], str]]


def _run(found: Found, folder: Path) -> Made:
    summary = found.summary
    if summary is None:
        raise ArtifactError(
            "there is no summary", where=str(folder / "summary.json"), got="no such file",
            expected="the folder of a finished run", do=f"Finish the run first: tersor resume {folder}",
        )  # fmt: skip
    more = (*found.behaviour, *found.measured)
    return {
        "html": lambda: render(summary.to_json(), found.records, more),
        "md": lambda: run_markdown(summary, found.records, more),
        "csv": lambda: csv_of(found.to_json()),
    }


def _evaluation(found: Found, folder: Path) -> Made:
    assert found.evaluation is not None, f"{folder} holds it"
    return _document(evaluation_document(found.evaluation, found.measured), found.evaluation.to_json())


def _benchmark(found: Found, folder: Path) -> Made:
    assert found.benchmark is not None, f"{folder} holds it"
    more = () if found.fits is None else fits_sections(found.fits)
    return _document(benchmark_document(found.benchmark, more), found.benchmark.to_json())


def _fits(found: Found, folder: Path) -> Made:
    assert found.fits is not None, f"{folder} holds it"
    return _document(fits_document(found.fits), found.fits.model_dump(mode="json"))


def _document(page: Document, data: Mapping[str, Any]) -> Made:
    return {"html": page.html, "md": lambda: document_markdown(page), "csv": lambda: csv_of(data)}


def _write(path: Path, text: str) -> Path:
    try:
        write_atomically(path, text.encode("utf-8", errors="replace"))
    except OSError as error:
        raise ArtifactError("cannot be written", where=str(path), got=error.strerror or error) from error
    return path


def _read(path: Path, parse: Callable[[Mapping[str, Any], str], Parsed], do: str) -> Parsed | None:
    """What a JSON file holds; None where there is none. Raises ArtifactError, saying what to ``do``."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is not JSON", where=str(path), got=str(error), do=do) from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path.name} holds no JSON object", where=str(path), got=type(data).__name__, do=do)
    return parse(data, str(path))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _read_records(path: Path) -> Sequence[Record]:
    if not path.exists():
        return ()
    lines = [
        line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()
    ]  # after the last newline: a torn line
    try:
        return [Record.from_json(json.loads(line)) for line in lines]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            "a record cannot be read", where=str(path), got=repr(error),
            do="Restore the file, or move it away: the report is then made from summary.json alone",
        ) from error  # fmt: skip
