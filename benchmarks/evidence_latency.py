"""Evidence: does a benchmark tell models apart, and does it tell a model from itself?

    python -m benchmarks.evidence_latency                 # 100 + 100 comparisons, under ten minutes on a quiet machine
    python -m benchmarks.evidence_latency --runs 10

A model is compared with itself, and with one that has 10 % more multiply-accumulates, by `tersor.benchmark` as users
call it. Each comparison is kept in --out as it is done, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import tersor
from benchmarks.claims import Claim, word
from benchmarks.tables import table, write
from tersor.measure.benchmark_schema import Word
from tersor.tensor.statistics import wilson

OUT = Path("runs/bench-evidence")
WIDTH, LAYERS, MORE, BATCH = 256, 20, 22, 8
CONDITIONS = tersor.Conditions(batch_sizes=(BATCH,), threads=(1,), seconds=1.0, window=0.0, starts=0)
ITSELF, HEAVIER = "itself", "10 % more work"
ALIKE, APART = "no difference shown", "slower"
WORDS = get_args(Word)
LEAST = {ITSELF: 0.90, HEAVIER: 0.80}
Run = Mapping[str, Any]


def main() -> None:
    """Compare, write docs/benchmarks/evidence-latency.md, and say which claims hold."""
    args = _arguments()
    found: dict[str, list[Run]] = {ITSELF: [], HEAVIER: []}
    with tempfile.TemporaryDirectory() as folder:
        model, heavier = (
            perceptron(Path(folder) / "model.onnx", LAYERS),
            perceptron(Path(folder) / "heavier.onnx", MORE),
        )
        kept = _kept(args.out)
        for number in range(args.runs):
            for arm, other in ((ITSELF, model), (HEAVIER, heavier)):
                run = kept.get((arm, number)) or compare(arm, number, model, other, args.out)
                found[arm].append(run)
        for arm, runs in found.items():
            print(f"{arm}: {dict(Counter(run['verdict'] for run in runs))}", flush=True)
    made = claims(found)
    write(
        "evidence-latency", "Evidence: does a benchmark tell models apart?", page(found, made), by="make bench-evidence"
    )
    missed = [claim for claim in made if claim.holds is False]
    print(f"{len(made) - len(missed)} of {len(made)} claims hold", flush=True)
    raise SystemExit(1 if missed else 0)


def compare(arm: str, number: int, model: Path, other: Path, out: Path) -> Run:
    """One comparison, as one benchmark makes it; kept in a line of a file."""
    data = tersor.Task(torch.nn.Identity(), example_inputs=(torch.randn(BATCH, WIDTH),))
    start = time.perf_counter()
    said = tersor.benchmark(model, other, data=data, conditions=CONDITIONS).comparisons[0]
    run = {
        "arm": arm, "number": number, "verdict": said.verdict, "ratio": said.speedup.value, "low": said.speedup.low,
        "high": said.speedup.high, "seconds": time.perf_counter() - start, "load": os.getloadavg()[0],
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with (out / "latency.jsonl").open("a") as file:
        file.write(json.dumps(run) + "\n")
    return run


def _kept(out: Path) -> dict[tuple[str, int], Run]:
    file = out / "latency.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {(line["arm"], line["number"]): line for line in lines}


def perceptron(path: Path, layers: int) -> Path:
    """An ONNX file of ``layers`` square products with ReLU: all its work is multiply-accumulates."""
    random = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for n in range(layers):
        weight = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        weights.append(numpy_helper.from_array(weight, f"w{n}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{n}"], [f"m{n}"]),
            helper.make_node("Relu", [f"m{n}"], [f"r{n}"]),
        ]
        last = f"r{n}"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", last))
    graph = helper.make_graph(nodes, path.stem, [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def claims(found: Mapping[str, Sequence[Run]]) -> list[Claim]:
    """What is claimed of verdicts, and whether it was found."""
    made = []
    for arm, wanted in ((ITSELF, ALIKE), (HEAVIER, APART)):
        right, n = sum(run["verdict"] == wanted for run in found[arm]), len(found[arm])
        low, high = wilson(right, n)
        against = arm if arm == ITSELF else f"one with {arm}"
        text = f"A model against {against}: “{wanted}” in at least {LEAST[arm]:.0%}"
        made.append(Claim(text, f"{right} of {n} [{low:.0%}, {high:.0%}]", right >= LEAST[arm] * n))
    wrong = sum(run["verdict"] == "faster" for run in found[HEAVIER])
    made.append(Claim("More work is never said to be faster", f"{wrong} of {len(found[HEAVIER])}", wrong == 0))
    return made


def page(found: Mapping[str, Sequence[Run]], made: Sequence[Claim]) -> str:
    """The page's body."""
    runs = [run for arm in found.values() for run in arm]
    loads, seconds = ([run[key] for run in runs] for key in ("load", "seconds"))
    return "\n\n".join([
        table(["claim", "found", ""], [[claim.text, claim.found, word(claim.holds)] for claim in made]),
        "Each comparison is one call of `tersor.benchmark` on two ONNX files: "
        f"{LAYERS} products of {WIDTH} × {WIDTH}, and the same file again, or one of {MORE} products. Batch {BATCH}, "
        f"one thread, {CONDITIONS.seconds:g} s of calls, {np.median(seconds):.1f} s in all (median). Comparisons of "
        f"both kinds alternate. Load of the machine meanwhile: {np.min(loads):.1f} to {np.max(loads):.1f}, median "
        f"{np.median(loads):.1f}.",
        table(["against", *WORDS, "ratio, median", "width, median"], list(_rows(found))),
        "*Ratio*: time of the model / time of the other. *Width*: upper end of its interval / lower end. The test is "
        "at 5 %, so up to 5 of 100 comparisons of a model with itself are expected to name a difference.",
    ])  # fmt: skip


def _rows(found: Mapping[str, Sequence[Run]]) -> Iterator[list[str]]:
    for arm, runs in found.items():
        counts = Counter(run["verdict"] for run in runs)
        said = [str(counts[each]) for each in WORDS]
        ratio = np.median([run["ratio"] for run in runs])
        width = np.median([run["high"] / run["low"] for run in runs])
        yield [arm, *said, f"{ratio:.3f}", f"{width:.3f}"]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="comparisons of each kind")
    parser.add_argument("--out", type=Path, default=OUT, help="where finished comparisons are kept")
    return parser.parse_args()


if __name__ == "__main__":
    main()
