"""What fits where, profiles and advice in the terminal, made of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tersor.core.measurement import Measurement
from tersor.report.format import MISSING, interval_of, scale_of, value_of
from tersor.report.table import plain_table

_LAYERS = 12
_FITS = {True: ("yes", "green"), False: ("no", "red"), None: ("cannot run", "yellow")}


def fits_view(found: Mapping[str, Any]) -> RenderableType:
    """A model on devices: ``model``, ``totals``, ``devices`` (as ``DeviceFits.to_json``)."""
    totals = {name: value_of(Measurement.from_json(value)) for name, value in found["totals"].items()}
    told = ", ".join(f"{name} {value}" for name, value in totals.items())
    parts: list[RenderableType] = [Text(f"{found['model']}, batch {found['batch']}: {told}")]
    for device in found["devices"]:
        parts += [Text(""), Text(device["title"], style="bold"), _rows(device)]
        parts += [Padding(line, (0, 0, 0, 2)) for line in _remarks(device)]
    parts.append(
        Text("Latencies are estimates by roofline: no faster than this; kernels rarely reach it.", style="dim")
    )
    return Group(*parts)


def _rows(device: Mapping[str, Any]) -> Table:
    decodes = any(row["token_latency"] for row in device["fits"])
    table = plain_table(
        "numbers", "fits", "weights", "activations", "cache", "latency ≥", "per token ≥", "waits for memory"
    )
    if not decodes:
        table = plain_table("numbers", "fits", "weights", "activations", "latency ≥", "waits for memory")
    table.columns[1].justify = "left"
    for row in device["fits"]:
        word, style = _FITS[row["fits"]]
        bound = MISSING if row["memory_bound"] is None else f"{100 * row['memory_bound']:.0f} % of it"
        middle = [_value(row["cache"])] if decodes else []
        last = [_value(row["token_latency"])] if decodes else []
        table.add_row(
            row["numbers"], Text(f"{word}: {row['reason']}", style=style), _value(row["weights"]),
            _value(row["activations"]), *middle, _value(row["latency"]), *last, bound,
        )  # fmt: skip
    return table


def _value(data: Mapping[str, Any] | None) -> str:
    return value_of(None if data is None else Measurement.from_json(data))


def _remarks(device: Mapping[str, Any]) -> list[Text]:
    lines = []
    for way in device["ways"]:
        kept = way["keep_channels"]
        pruned = (
            ""
            if kept >= 1
            else f" with {100 * kept:.0f} % of the channels ({100 * way['weight_sparsity']:.0f} % of weights gone)"
        )
        lines.append(Text(f"would fit: {way['numbers']}{pruned}", style="cyan"))
    if not device["ways"] and all(row["fits"] is False for row in device["fits"]):
        lines.append(Text("would not fit with a tenth of its channels either", style="red"))
    lines += [Text(f"careful: {what}", style="yellow") for what in device["cautions"]]
    lines += [Text(f"note: {note}", style="dim") for note in device["notes"]]
    return lines


def roofline_view(device: Mapping[str, Any]) -> RenderableType:
    """The layers that take longest under a device's roofline, and what that says of each."""
    rows = sorted(device["layers"], key=lambda row: -row["ms"])
    table = plain_table("layer", "MACs", "ops/byte", "limit", "bound", "share", "what helps")
    table.columns[-1].justify = "left"
    for row in rows[:_LAYERS]:
        macs = scale_of(row["macs"], "macs").full(row["macs"])
        ridge = MISSING if row["ridge"] is None else f"{row['ridge']:.1f}"
        share, intensity = f"{100 * row['share']:.1f} %", f"{row['intensity']:.1f}"
        table.add_row(row["path"] or "<model>", macs, intensity, ridge, row["bound"], share, Text(row["advice"]))
    rest = len(rows) - min(len(rows), _LAYERS)
    table.caption = "limit: operations per byte above which arithmetic decides." + (
        f" {rest} more." if rest > 0 else ""
    )
    return table


def _aliases(names: Sequence[str]) -> Text:
    return Text(f"\nalso {', '.join(names)}" if names else "", style="dim")


def profiles_view(found: Sequence[Mapping[str, Any]]) -> Table:
    """The profiles that come along: name, what it is, memory, bandwidth, compute in float and int8."""
    table = plain_table("profile", "device", "memory", "GB/s", "GOPS float", "GOPS int8")
    table.columns[1].justify = "left"
    for profile in found:
        compute = profile["compute"]
        floats = max((compute[name]["value"] for name in ("fp32", "fp16", "bf16") if name in compute), default=None)
        integers = compute["int8"]["value"] if "int8" in compute else None
        memory = profile["memory"]["value"]
        table.add_row(
            profile["name"], Text.assemble(profile["title"], _aliases(profile["aliases"])),
            scale_of(memory, "bytes").full(memory), f"{profile['bandwidth']['value'] / 1e9:.3g}",
            *(MISSING if value is None else f"{value / 1e9:,.3g}" for value in (floats, integers)),
        )  # fmt: skip
    table.caption = (
        "tersor profiles NAME prints one as YAML with the source of each figure; copy it for your own device."
    )
    return table


def advice_view(found: Mapping[str, Any]) -> RenderableType:
    """Advice (``Advice.to_json``): its lines with their reasons, what was tried, best first, what goes wrong there."""
    parts: list[RenderableType] = [Text(f"{found['model']} on {found['title']}, batch {found['batch']}", style="bold")]
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim")
    body.add_column(overflow="fold", ratio=1)
    for line in found["lines"]:
        body.add_row(line["topic"], Text.assemble((line["what"], "bold"), f"\n{line['reason']} [{line['basis']}]"))
    parts += [body, _trials(found) if found["trials"] else _expected(found)]
    parts += [Text(f"not tried: {trial['name']}: {trial['why_not']}", style="dim")
              for trial in found["trials"] if trial["why_not"]]  # fmt: skip
    parts += [
        Text(f"note: {trial['name']}: {trial['note']}", style="dim") for trial in found["trials"] if trial["note"]
    ]
    parts += [Text(f"careful: {what}", style="yellow") for what in found["cautions"]]
    return Group(*parts)


def _trials(found: Mapping[str, Any]) -> Table:
    table = plain_table("tried, untrained", "verdict", "speed", "by roofline", "lost", "file")
    table.columns[1].justify = "left"
    original = found["original"]
    table.add_row("original", "", _value(original.get("latency_ms")), "", "", _value(original["size_bytes"]))
    for trial in found["trials"]:
        if trial["measured"]:
            measured = {name: Measurement.from_json(value) for name, value in trial["measured"].items()}
            lines = (_two(measured["speedup"]), _value(trial["expected"]), _two(measured["drop_points"]))
            table.add_row(trial["name"], trial["verdict"], *lines, value_of(measured["size_bytes"]))
    table.caption = "lost: on validation, in points, before any repair. [ ]: 95 % interval."
    return table


def _two(measured: Measurement) -> Text:
    text = Text(scale_of(measured.value, measured.unit).bare(measured.value))
    return text.append("\n" + interval_of(measured), style="dim") if interval_of(measured) else text


def _expected(found: Mapping[str, Any]) -> Table:
    table = plain_table("way", "fits", "expected speed")
    for each in found["expected"]:
        table.add_row(each["name"], {True: "yes", False: "no", None: MISSING}[each["fits"]], _value(each["speedup"]))
    table.caption = "By roofline, an estimate; what it costs in quality is not known: advise --on this tries it."
    return table
