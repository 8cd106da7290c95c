"""docs/coverage.md: counts against the targets, what is not done and why, and a row for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.zoo.verdict import DIFFERENCE, MACS_LEFT, OK, SECONDS, is_wrong, peer_verdict, seconds, verdict

Facts = Mapping[str, Any]
Results = Mapping[tuple[str, str], Facts]
# suite -> the target in words, and how many may be missing of how many
TARGETS = {"torchvision": ("all", 0, 1), "timm": ("38 of 40", 2, 40), "transformers": ("all", 0, 1)}
DEEPEST, DEEPEST_SECONDS = "torchvision/densenet201", 3.0  # a model of its own target, and that target
HEADER = (
    "model", "input", "parameters", "groups pruned", "skips", "parameters left", "MACs left", "capture s",
    "planning + surgery s", "difference", "trains", "reloads", "ONNX", "verdict", "Torch-Pruning", "its s",
)  # fmt: skip


def page(keys: Sequence[tuple[str, str]], results: Results, code: str, machine: str) -> str:
    """The whole page. ``keys``: (suite/name, note) of every model, run or not. ``code``: this code's fingerprint."""
    suites = list(dict.fromkeys(key.partition("/")[0] for key, _ in keys))
    parts = ["# What structured pruning covers", _INTRODUCTION, _summary(suites, keys, results)]
    stale = sum((key, "tersor") in results and results[key, "tersor"]["code"] != code for key, _ in keys)
    if stale:
        parts.append(f"**{stale} of these results are of an earlier state of the code.**")
    if deepest := results.get((DEEPEST, "tersor")):
        took = (
            f"{seconds(deepest):.1f} s of planning and surgery beside {deepest.get('capture_s', 0.0):.1f} s of capture"
        )
        parts.append(f"{DEEPEST.partition('/')[2]}: {took}; the target is {DEEPEST_SECONDS:.0f} s.")
    parts.append(_missing(keys, results))
    for suite in suites:
        parts += [f"## {suite}", _models([pair for pair in keys if pair[0].startswith(f"{suite}/")], results)]
    return "\n\n".join([*parts, f"Measured on: {machine}. Written by `make zoo` (`benchmarks/zoo/`).", ""])


_INTRODUCTION = f"""\
Each model is built in float64 without pretrained weights; its affine parameters, layer scales and running statistics
are drawn at random, and weak weights are scaled up until half of the channels matter to the output. It is pruned with
`PruneChannels(sparsity=0.5, score=Magnitude())` in a process of its own, and counts as done with at most
{100 * MACS_LEFT:.0f} % of the multiply-accumulates left, an output within {DIFFERENCE:g} (relative) of the masked
model's, a training step that runs, an artifact that a fresh original loads with identical outputs, and at most
{SECONDS:.0f} s of planning and surgery. Seconds are processor seconds of one thread; capture, apart, is what
`torch.export` takes. MACs are those of the small inputs given here. Torch-Pruning runs on the same models in float32,
without hints for the model, within the same time and memory; what it gives is asked to run with the same output
shape, no more."""


def _summary(suites: Sequence[str], keys: Sequence[tuple[str, str]], results: Results) -> str:
    rows = []
    for suite in suites:
        own = [key for key, _ in keys if key.startswith(f"{suite}/")]
        facts = [results[key, "tersor"] for key in own if (key, "tersor") in results]
        peers = [results[key, "torch-pruning"] for key in own if (key, "torch-pruning") in results]
        done = sum(verdict(found) == OK for found in facts)
        words, missing, of = TARGETS[suite]
        met = len(facts) == len(own) and (len(own) - done) * of <= missing * len(own)
        rows.append([
            suite, str(len(own)), str(len(facts)), str(done), words, "met" if met else "not met",
            str(sum(map(is_wrong, facts))), _longest(facts), _peer_count(peers),
        ])  # fmt: skip
    header = ["suite", "models", "run", "done", "target", "", "wrong outputs", "longest planning + surgery",
              "Torch-Pruning: at most 45 % left / runs / tried"]  # fmt: skip
    return _table(header, rows)


def _longest(facts: Sequence[Facts]) -> str:
    if not facts:
        return "–"
    worst = max(facts, key=seconds)
    return f"{seconds(worst):.1f} s ({worst['key'].partition('/')[2]})"


def _peer_count(peers: Sequence[Facts]) -> str:
    runs = sum("macs_left" in found for found in peers)
    return f"{sum(peer_verdict(found) == OK for found in peers)} / {runs} / {len(peers)}"


def _missing(keys: Sequence[tuple[str, str]], results: Results) -> str:
    lines = []
    for key, _ in keys:
        facts = results.get((key, "tersor"))
        if facts is None or verdict(facts) == OK:
            continue
        main = [reason for reason in facts.get("reasons") or [] if "the model's output" not in reason["example"]]
        why = f" Most kept by: {_cell(main[0]['example'])} ({main[0]['count']} ×)." if main else ""
        lines.append(f"* **{key}**: {_cell(verdict(facts))}.{why}")
    return "## Not done\n\n" + ("\n".join(lines) or "Nothing of what was run.")


def _models(keys: Sequence[tuple[str, str]], results: Results) -> str:
    return _table(HEADER, [row(key, note, results) for key, note in keys])


def row(key: str, note: str, results: Results) -> list[str]:
    """The cells of a model, in the order of HEADER."""
    facts, peer = results.get((key, "tersor")), results.get((key, "torch-pruning"))
    name = key.partition("/")[2]
    if facts is None:
        return [name, note, *["–"] * (len(HEADER) - 5), "not run", *_peer_cells(peer)]
    said = verdict(facts)
    return [
        name, ", ".join(facts.get("inputs", [])) + (f" ({note})" if note else ""),
        _number(facts.get("parameters", 0) / 1e6, "{:.2f} M"),
        str(facts.get("groups", "–")), str(facts.get("skips", "–")),
        _number(facts.get("parameters_left"), "{:.1%}"), _number(facts.get("macs_left"), "{:.1%}"),
        _number(facts.get("capture_s"), "{:.1f}"), _number(seconds(facts), "{:.1f}"),
        _number(facts.get("difference"), "{:.1e}"), _yes(facts.get("trains")), _yes(facts.get("reloads")),
        _number(facts.get("onnx"), "{:.1e}"), "**ok**" if said == OK else _cell(said)[:90], *_peer_cells(peer),
    ]  # fmt: skip


def _peer_cells(peer: Facts | None) -> list[str]:
    if peer is None:
        return ["–", "–"]
    said = f"{peer['macs_left']:.1%}" if "macs_left" in peer else _cell(peer_verdict(peer))[:60]
    return [said, _number(peer.get("prune_s"), "{:.1f}")]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _yes(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _cell(text: str) -> str:
    """Text that neither ends a cell nor begins markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").rstrip(".")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
