"""Every measurement of a JSON file as a row, for spreadsheets and scripts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from io import StringIO
from typing import Any

COLUMNS = ("what", "value", "unit", "low", "high", "n", "device", "conditions")
_MEASUREMENT = {"value", "unit", "low", "high"}
_NAMES = ("number", "name", "base", "model", "severity", "against", "batch", "threads")


def csv_of(data: Mapping[str, Any]) -> str:
    """The measurements of ``data``, one a line; ``what`` is where each lies, its parts joined by "/".

    An end of an interval that is not known is empty; ``conditions`` is JSON.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for place, found in measurements_of(data):
        conditions = json.dumps(found.get("conditions") or {}, ensure_ascii=False)
        writer.writerow(["/".join(place), *(found.get(name) for name in COLUMNS[1:-1]), conditions])
    return text.getvalue()


def measurements_of(data: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """(where, measurement as JSON) of every measurement in ``data``, in the order of the file.

    Of a list's entries the name says which it is, with what else tells it from its neighbours; else its position.
    """
    if isinstance(data, Mapping):
        if _MEASUREMENT <= data.keys():
            yield place, data
            return
        for name, value in data.items():
            yield from measurements_of(value, (*place, str(name)))
    elif isinstance(data, (list, tuple)):
        for number, value in enumerate(data):
            yield from measurements_of(value, (*place, _name(value, number)))


def _name(value: Any, number: int) -> str:
    if not isinstance(value, Mapping) or not {"name", "model"} & value.keys():
        return str(number)
    told = (value[key] for key in _NAMES if value.get(key) not in (None, ""))
    return " ".join(f"{each:.6g}" if isinstance(each, float) else str(each) for each in told)
