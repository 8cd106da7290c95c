"""What pages are made of: sections of sentences, plots, tables and samples; and the templates that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tersor.report import format as numbers
from tersor.report.plots import Plot

_NAME, _HALF = 20, 66  # characters of a name before it wraps; of a row in half a page


@dataclass(frozen=True)
class Figure:
    """One of the large figures at the top: "14.2×" "smaller"."""

    value: str
    label: str
    interval: str


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of each row its name. ``folded``: what a reader opens it by; empty: it lies open."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    folded: str = ""

    @property
    def wide(self) -> bool:
        """Whether it needs more than half a page; the first column may wrap."""
        widths = [max(len(row[column]) for row in (self.header, *self.rows)) for column in range(len(self.header))]
        return min(widths[0], _NAME) + sum(widths[1:]) + 2 * len(widths) > _HALF


@dataclass(frozen=True)
class Sample:
    """One input that is shown: ``picture`` is a data URI, empty where the input is none."""

    title: str
    lines: tuple[str, ...]
    picture: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page. ``meaning``: what is shown, for somebody who was not there; ``says``: what it says here."""

    key: str
    title: str
    meaning: str
    says: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Document:
    """A page of sections under a verdict. ``status``: passed, failed, open, or muted; ``source``: the file it is of.

    ``skipped``: what was not measured, and why; None where nothing is measured, as of estimates.
    """

    title: str
    kicker: tuple[str, ...]
    status: str
    word: str
    headline: str
    sections: tuple[Section, ...]
    source: str
    tersor: str
    figures: tuple[Figure, ...] = ()
    reading: str = ""
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] | None = ()
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def facts_title(self) -> str:
        """What stands above the facts."""
        return "What was read" if self.skipped is None else "How it was measured"

    def html(self) -> str:
        """The page; it needs no network."""
        return fill("document.html", page=self)


def fill(template: str, **values: Any) -> str:
    """The page that a template of this folder makes of ``values``, its style inside; it needs no network."""
    environment = Environment(
        loader=FunctionLoader(_resource), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        value=numbers.value_of, interval=numbers.interval_of, human=numbers.human, duration=numbers.duration,
        tight=numbers.tight, plain=numbers.plain, python=repr,
    )  # fmt: skip
    return environment.get_template(template).render(style=Markup(_resource("style.css")), **values)


@cache
def _resource(name: str) -> str:
    return resources.files("tersor.report").joinpath(name).read_text(encoding="utf-8")
