"""Prune the zoo: each model in a process of its own, with a limit on time and memory.

python -m benchmarks.zoo --suite torchvision --only 'resnet*' --jobs 2 --no-peer
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.zoo.catalogue import SUITES, Entry, catalogue, matching
from benchmarks.zoo.limits import ROOT, watched
from benchmarks.zoo.page import page
from benchmarks.zoo.results import append, fingerprint, latest
from benchmarks.zoo.stages import read_notes
from benchmarks.zoo.verdict import OK, is_wrong, peer_verdict, seconds, verdict
from tersor.run.environment import environment

RESULTS, PAGE = ROOT / "runs" / "zoo" / "results.jsonl", ROOT / "docs" / "coverage.md"
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "torch-pruning")
# What finds groups, decides, cuts and verifies: a result of another engine is run again. Torch-Pruning's depends on its
# version.
ENGINE = (
    ROOT / "tersor" / "graph",
    *(ROOT / "tersor" / "core" / f"{name}.py" for name in ("apply", "copies", "edit", "verify")),
    *(ROOT / "tersor" / "prune" / "structured" / f"{name}.py" for name in ("amount", "channels", "eligible", "trial")),
    *(ROOT / "tersor" / "prune" / "structured" / "scores" / f"{name}.py" for name in ("coupling", "magnitude")),
)
_writing, _cancelled = threading.Lock(), threading.Event()


def main() -> int:
    """Run what is asked for. 1 where a model came out wrong, else 0."""
    arguments = _arguments()
    chosen = matching(catalogue(arguments.suite or SUITES), arguments.only)
    if arguments.list:
        print("\n".join(f"{model.key:45} {model.note}" for model in chosen))
        return 0
    results = latest(arguments.results)
    todo = [] if arguments.table else list(_to_run(chosen, results, arguments))
    print(f"{len(chosen)} models, {len(todo)} runs to do, {arguments.jobs} at once; results in {arguments.results}")
    print(
        _LINE.format("model", "MACs", "params", "groups", "skips", "capture", "plan", "difference", "wall", "verdict")
    )
    if not _all_run(todo, arguments):
        return 130
    results = latest(arguments.results)
    if arguments.table:
        for model in chosen:
            _print_line(results.get((model.key, "tersor")), 0.0)
    _print_summary(chosen, results)
    target = arguments.page or (None if arguments.only or arguments.suite or arguments.table else PAGE)
    if target:
        _write_page(target, results)
    return int(any(is_wrong(results[model.key, "tersor"]) for model in chosen if (model.key, "tersor") in results))


def _all_run(jobs: Sequence[tuple[Entry, str]], arguments: argparse.Namespace) -> bool:
    """Run the jobs side by side. Interrupted or terminated, it ends the processes, files no more and says False."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for done in [pool.submit(_run, *job, arguments) for job in jobs]:
                done.result()
        except KeyboardInterrupt:
            _cancelled.set()
            pool.shutdown(cancel_futures=True)
            print("interrupted; what was finished is kept")
            return False
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="GLOB", help="models by name or suite/name; may be repeated")
    add("--suite", action="append", choices=SUITES)
    add("--jobs", type=int, default=2)
    add("--no-peer", action="store_true", help="without Torch-Pruning beside it")
    add("--onnx", action="store_true", help="export and compare with ONNX Runtime too (slow)")
    add("--again", action="store_true", help="run models that have a result of this code, too")
    add(
        "--failed",
        action="store_true",
        help="run those without a result and those whose last one is not ok, whatever code it is of",
    )
    add("--limit", type=float, default=60.0, help="processor seconds for planning and surgery (default 60)")
    add("--wall", type=float, default=600.0, help="seconds by the clock for a process in all (default 600)")
    add("--memory", type=float, default=10.0, help="GiB for a process (default 10)")
    add("--results", type=Path, default=RESULTS)
    add("--page", type=Path, help="write the page here; docs/coverage.md where neither --only nor --suite is given")
    add("--list", action="store_true", help="print the models and leave")
    add("--table", action="store_true", help="print the stored results and run nothing")
    return parser.parse_args()


def _to_run(chosen: Sequence[Entry], results: dict[tuple[str, str], dict[str, Any]], arguments: argparse.Namespace):  # type: ignore[no-untyped-def]
    code = _code()
    for model in chosen:
        for tool in ("tersor",) if arguments.no_peer else ("tersor", "torch-pruning"):
            last = results.get((model.key, tool))
            if last is None or arguments.again:
                yield model, tool
            elif arguments.failed:
                if tool == "tersor" and verdict(last) != OK:
                    yield model, tool
            elif last["code"] != code[tool]:
                yield model, tool


def _code() -> dict[str, str]:
    """What the results of each tool depend on."""
    return {"tersor": fingerprint(ENGINE), "torch-pruning": version("torch-pruning")}


def _run(model: Entry, tool: str, arguments: argparse.Namespace) -> None:
    """One tool on one model, in a process; its result is filed and a line printed."""
    module = "benchmarks.zoo.worker" if tool == "tersor" else "benchmarks.zoo.peer"
    code = _code()[tool]  # now: it may change while the model is being pruned
    options = ["--onnx"] if arguments.onnx and tool == "tersor" else []
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        notes = Path(folder) / "notes.jsonl"
        given = [model.key, str(notes), "--limit", str(arguments.limit), *options]
        outcome = watched(
            module, given, seconds=arguments.wall, gib=arguments.memory, cancelled=_cancelled.is_set
        )  # fmt: skip
        if _cancelled.is_set():
            return
        facts = read_notes(notes) if notes.exists() else {}
    facts = {
        "key": model.key, "tool": tool, **facts, "stopped": outcome.stopped, "wall_s": outcome.seconds,
        "peak_gib": max(outcome.peak_gib, facts.get("peak_gib", 0.0)), "code": code,
        "commit": _commit(),
        "versions": {library: version(library) for library in LIBRARIES}, "at": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    if any(name.startswith("error_") for name in facts) or outcome.stopped:
        facts["stderr"] = outcome.stderr[-4000:]
    with _writing:
        append(arguments.results, facts)
        _print_line(facts, outcome.seconds)


_LINE = "{:42} {:>6} {:>6} {:>6} {:>5} {:>7} {:>6} {:>10} {:>5}  {}"


def _print_line(facts: dict[str, Any] | None, wall: float) -> None:
    if facts is None:
        return
    if facts["tool"] == "torch-pruning":
        cells = [f"  {facts['key']} (Torch-Pruning)"[:42], _percent(facts, "macs_left"), "", "", "", "",
                 f"{facts.get('prune_s', 0):.1f}", "", f"{wall:.0f}", peer_verdict(facts)[:160]]  # fmt: skip
    else:
        difference = facts.get("difference")
        cells = [
            facts["key"][:42], _percent(facts, "macs_left"), _percent(facts, "parameters_left"),
            str(facts.get("groups", "")), str(facts.get("skips", "")), f"{facts.get('capture_s', 0):.1f}",
            f"{seconds(facts):.1f}", "" if difference is None else f"{difference:.1e}", f"{facts['wall_s']:.0f}",
            verdict(facts)[:160],
        ]  # fmt: skip
    print(_LINE.format(*cells))
    for reason in (facts.get("reasons") or [])[:2] if facts["tool"] == "tersor" and verdict(facts) != OK else []:
        print(f"      {reason['count']} × ({reason['macs_share']:.0%} of the MACs left) {reason['example'][:200]}")
    sys.stdout.flush()


def _percent(facts: dict[str, Any], name: str) -> str:
    return f"{100 * facts[name]:.1f}%" if name in facts else ""


def _print_summary(chosen: Sequence[Entry], results: dict[tuple[str, str], dict[str, Any]]) -> None:
    facts = [results[model.key, "tersor"] for model in chosen if (model.key, "tersor") in results]
    peers = [results[model.key, "torch-pruning"] for model in chosen if (model.key, "torch-pruning") in results]
    done = sum(verdict(found) == OK for found in facts)
    print(f"Tersor: {done} ok of {len(facts)} run of {len(chosen)} chosen, {sum(map(is_wrong, facts))} wrong. "
          f"Torch-Pruning: {sum(peer_verdict(found) == OK for found in peers)} ok of {len(peers)} run.")  # fmt: skip


def _write_page(target: Path, results: dict[tuple[str, str], dict[str, Any]]) -> None:
    facts = environment()
    libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    keys = [(model.key, model.note) for model in catalogue()]
    target.write_text(page(keys, results, _code()["tersor"], f"{facts['cpu']}, one thread for each model; {libraries}"))
    print(f"wrote {target}")


def _commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
