"""Tables about files of weights, made of plain data, at home in 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.report.format import MISSING, count, scale_of, shape_of
from tersor.report.skips import skip_lines
from tersor.report.table import plain_table


def pruned_view(done: Mapping[str, Any]) -> RenderableType:
    """What ``PrunedFile.to_json`` says: a row for each tensor, the total, what was passed over, honest bytes."""
    table = plain_table("tensor", "shape", "asked", "zeros", "dense", "smallest")
    for row in done["tensors"]:
        target = MISSING if row["target"] is None else f"{100 * row['target']:.2f} %"
        table.add_row(
            Text(row["name"]), Text(shape_of(row["shape"])), Text(target), Text(_share(row["zeros"], row["size"])),
            Text(_bytes(row["dense_bytes"])), Text(f"{_bytes(row['smallest_bytes'])} {row['encoding']}"),
        )  # fmt: skip
    dense, smallest = (sum(row[name] for row in done["tensors"]) for name in ("dense_bytes", "smallest_bytes"))
    table.add_section()
    table.add_row(
        Text("all of these"), Text(count(done["size"])), Text(""), Text(_share(done["zeros"], done["size"])),
        Text(_bytes(dense)), Text(_bytes(smallest)),
    )  # fmt: skip
    lines = skip_lines(done["skips"], "tensors")
    lines += [
        f"{done['zeros']:,} of {done['size']:,} weights are zero.",
        f"The file is as large as before: it is dense, zeros included. Encoded, these tensors would take "
        f"{_bytes(smallest)} instead of {_bytes(dense)}.",
        f"written: {done['out']}",
    ]
    return Group(table, *(Text(line) for line in lines))


def quantized_view(done: Mapping[str, Any]) -> RenderableType:
    """What ``QuantizedFile.to_json`` says: a row for each tensor that was changed, the total, what was passed over."""
    table = plain_table("tensor", "shape", "from", "to", "was", "is", "lost")
    for row in done["tensors"]:
        table.add_row(
            Text(row["name"]), Text(shape_of(row["shape"])), Text(row["dtype"]), Text(row["stored"]),
            Text(_bytes(row["dense_bytes"])), Text(_bytes(row["stored_bytes"])), Text(f"{100 * row['error']:.2g} %"),
        )  # fmt: skip
    dense, stored = done["dense_bytes"], done["stored_bytes"]
    table.add_section()
    table.add_row(
        Text("all of these"), Text(""), Text(""), Text(""), Text(_bytes(dense)), Text(_bytes(stored)), Text("")
    )
    lines = skip_lines(done["skips"], "tensors")
    lines += [
        f"These tensors take {_bytes(stored)} instead of {_bytes(dense)}: {dense / max(1, stored):.2f} times less.",
        "lost: the share of the sum of squares. What that costs in accuracy only the model on data can say.",
        f"written: {done['out']}",
    ]
    return Group(table, *(Text(line) for line in lines))


def weights_view(found: Mapping[str, Any]) -> RenderableType:
    """What ``WeightsFacts.to_json`` says: magnitudes of each tensor, then bytes."""
    parts: list[RenderableType] = [
        Text(f"{len(found['tensors'])} tensors, {count(found['totals']['size'])} numbers", style="bold"),
        *(Text(f"{name}: {value}", style="dim") for name, value in found["metadata"].items()),
        _magnitudes(found),
        _sizes(found),
    ]
    if any(tensor["zip_sampled"] for tensor in found["tensors"]):
        parts.append(Text("≈: estimated from parts of the tensor", style="dim"))
    return Group(*parts)


def _magnitudes(found: Mapping[str, Any]) -> Table:
    table = plain_table("tensor", "type", "shape", "zeros", "near zero", "|w| p50", "p90", "p99")
    for tensor in found["tensors"]:
        cells = [tensor["dtype"], shape_of(tensor["shape"])]
        cells += [MISSING if tensor[name] is None else f"{100 * tensor[name]:.1f} %" for name in ("zeros", "near_zero")]
        cells += [
            f"{tensor['percentiles'][p]:.3g}" if tensor["percentiles"] else MISSING for p in ("p50", "p90", "p99")
        ]
        name = Text(tensor["name"])
        if tensor["not_finite"]:
            name.append(f"\n{tensor['not_finite']:,} are NaN or infinite", style="bold red")
        table.add_row(name, *map(Text, cells))
    return table


def _sizes(found: Mapping[str, Any]) -> Table:
    table = plain_table("tensor", "stored", "as", "smallest", "as", "zipped")
    for tensor in found["tensors"]:
        zipped = ("≈ " if tensor["zip_sampled"] else "") + _bytes(tensor["zip_bytes"])
        best = tensor["smallest"]
        cells = [_bytes(tensor["stored_bytes"]), tensor["stored"], _bytes(tensor["encodings"][best]), best, zipped]
        table.add_row(Text(tensor["name"]), *map(Text, cells))
    totals = found["totals"]
    table.add_section()
    cells = [_bytes(totals["stored_bytes"]), "", _bytes(totals["smallest_bytes"]), "", _bytes(totals["zip_bytes"])]
    table.add_row(Text("all"), *map(Text, cells))
    return table


def _bytes(value: int) -> str:
    return scale_of(value, "bytes").full(value)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2f} %"
