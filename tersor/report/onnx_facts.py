"""How an ONNX file compares with the PyTorch model that it was made of, in words: for the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tersor.core.measurement import Measurement
from tersor.report import format as numbers


def onnx_facts(onnx: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, what was found) of comparing an ONNX file with PyTorch: agreement with its interval, then the rest."""
    found: list[tuple[str, str]] = []
    told: set[str] = set()
    samples = f", {onnx['n']} samples" if onnx.get("n") else ""
    if onnx.get("relative_difference") is not None:
        allowed = f" (allowed: {onnx['tolerance']:.0e})" if onnx.get("tolerance") is not None else ""
        difference = f"largest relative difference {onnx['relative_difference']:.1e}"
        found.append(("ONNX against PyTorch", f"{difference}{allowed}{samples}"))
        told = {"relative_difference", "tolerance", "n"}
    elif onnx.get("top1_agreement") is not None:
        same = Measurement(onnx["top1_agreement"], "fraction", onnx.get("low"), onnx.get("high"))
        found.append(("ONNX against PyTorch", f"same answer for {numbers.both_of(same)}{samples}"))
        told = {"top1_agreement", "low", "high", "n"}
    if isinstance(onnx.get("within_one_step"), float):
        found.append(("outputs at most one step apart", f"{100 * onnx['within_one_step']:.1f} %"))
        told |= {"within_one_step"}
    share = onnx.get("integer_share")
    if isinstance(share, Mapping) and share.get("integer"):
        found.append(("products in integers", f"{share['integer']} of {share.get('total', numbers.MISSING)}"))
        stayed = share.get("float_layers")
        found += [("layers that stayed float", numbers.plain(stayed))] if stayed else []
    if isinstance(onnx.get("equal"), bool):
        found.append(("equal within the limits of int8", numbers.plain(onnx["equal"])))
    told |= {"integer_share", "equal"}
    rest = ((key, value) for key, value in onnx.items() if key not in told and value not in ({}, [], None))
    return found + [(f"ONNX {numbers.human(str(key))}", numbers.plain(value)) for key, value in rest]


def load_check_view(found: Mapping[str, Any], metric: str, unit: str) -> RenderableType:
    """What ``load_check`` found, for the terminal; ``metric``: its name among the facts, ``unit``: its unit."""
    facts = {name: value for name, value in found.items() if name not in (metric, "samples")}
    lines = Table.grid(padding=(0, 2))
    value = numbers.value_of(Measurement(found[metric], unit))
    again = f"{value} on {found['samples']} test samples, as in the summary"
    for name, said in ((numbers.human(metric), again), *onnx_facts(facts)):
        lines.add_row(Text(name, style="dim"), Text(said))
    return Group(Text(f"The artifact loads into the original architecture; {_agrees(facts)}."), lines)


def _agrees(facts: Mapping[str, Any]) -> str:
    if facts.get("equal") is False:
        return "the ONNX file comes near it, yet is not equal within the limits of int8"
    return "the ONNX file agrees with it"
