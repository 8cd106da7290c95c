"""One model through Tersor: built, captured, pruned, compared, saved, loaded and trained; facts go to a file.

``python -m benchmarks.zoo.worker suite/name NOTES``
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalogue import Entry, entry
from benchmarks.zoo.limits import budget
from benchmarks.zoo.randomise import randomise
from benchmarks.zoo.reasons import heaviest, reasons
from benchmarks.zoo.stages import Notes, StageError, capture_apart
from tersor.core.apply import apply
from tersor.core.plan import Plan
from tersor.core.randomness import fixed_randomness
from tersor.core.task import Task
from tersor.core.verify import relative_difference, verify_edits
from tersor.export.artifact import load_artifact, save_artifact
from tersor.export.base import Base
from tersor.measure.compute import layer_table
from tersor.prune.structured.channels import PruneChannels
from tersor.prune.structured.scores import Magnitude

SPARSITY = 0.5
SEED = 1


def main() -> None:
    """Parse the command line, work, and leave the rest to the notes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("key")
    parser.add_argument("notes", type=Path)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for planning and surgery, beside capture")
    parser.add_argument("--onnx", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    notes = Notes(arguments.notes)
    try:
        work(entry(arguments.key), notes, limit=arguments.limit, onnx=arguments.onnx)
    except StageError:
        pass
    notes.add(peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def built(model: Entry, seed: int, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model, fresh from ``seed`` and in eval mode, and its example inputs."""
    torch.manual_seed(seed)
    inputs = tuple(value.to(dtype) if value.is_floating_point() else value for value in model.inputs())
    return model.build().to(dtype).eval(), inputs


def work(given: Entry, notes: Notes, *, limit: float, onnx: bool) -> None:
    """Everything that the zoo asks of a model. Raises StageError where it stops."""
    with notes.stage("build"):
        model, inputs = built(given, SEED)
        randomise(model, inputs, SEED)
        task = Task(model=model, example_inputs=inputs, output_of=given.output_of, name=given.name)
        before = layer_table(model, inputs)
        notes.add(inputs=["×".join(map(str, value.shape)) for value in inputs], **_size(model, before))
    plan = _plan(model, task, notes, limit)
    with notes.stage("apply"):
        start = time.process_time()
        edited = apply(model, plan)
        notes.add(apply_s=time.process_time() - start)
    failed = 0
    for stage, check in (("measure", _measure), ("verify", _verify), ("reload", _reload), ("train", _train)):
        try:
            with notes.stage(stage):
                check(given, task, plan, edited, notes)
        except StageError:
            failed += 1
    if onnx and not failed:
        with notes.stage("onnx"):
            _onnx(task, edited, notes)
    notes.add(stage="done")


def _size(model: nn.Module, table: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    return {"parameters": sum(p.numel() for p in model.parameters()), "macs": sum(row["macs"] for row in table)}


def _plan(model: nn.Module, task: Task, notes: Notes, limit: float) -> Plan:
    """The plan; its seconds without what torch.export took, which are noted apart."""
    spent: list[float] = []
    start, clock = time.process_time(), time.monotonic()
    try:
        with notes.stage("plan"), budget(limit), capture_apart() as spent:
            plan = PruneChannels(sparsity=SPARSITY, score=Magnitude()).plan(model, task)
    finally:
        notes.add(
            capture_s=sum(spent), captures=len(spent) // 2, plan_s=time.process_time() - start - sum(spent),
            plan_wall_s=time.monotonic() - clock,
        )  # fmt: skip
    notes.add(groups=len(plan.lines), skips=len(plan.skips))
    return plan


def _measure(given: Entry, task: Task, plan: Plan, edited: nn.Module, notes: Notes) -> None:
    assert task.example_inputs is not None
    before, after = layer_table(task.model, task.example_inputs), layer_table(edited, task.example_inputs)
    left, whole = _size(edited, after), _size(task.model, before)
    notes.add(
        parameters_left=left["parameters"] / whole["parameters"], macs_left=left["macs"] / whole["macs"],
        reasons=reasons(plan.skips, after), heaviest=heaviest(before, after),
    )  # fmt: skip


def _verify(given: Entry, task: Task, plan: Plan, edited: nn.Module, notes: Notes) -> None:
    start = time.process_time()
    difference = verify_edits(task.model, edited, plan, task, tolerance=math.inf)
    notes.add(difference=difference, verify_s=time.process_time() - start)
    notes.add(effect=relative_difference(_output(edited, task), _output(task.model, task)))


def _reload(given: Entry, task: Task, plan: Plan, edited: nn.Module, notes: Notes) -> None:
    """Save the edited model, load it into a fresh original of other weights, and compare their outputs."""
    assert task.example_inputs is not None
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        save_artifact(Path(folder) / "model", edited, original=Base.of(task.model), plans=[plan])
        fresh, _ = built(given, SEED + 1)
        loaded = load_artifact(Path(folder) / "model", fresh, in_place=True)
    same = torch.equal(_output(loaded, task), _output(edited, task))
    notes.add(reloads=same)


def _output(model: nn.Module, task: Task) -> Tensor:
    assert task.example_inputs is not None
    with torch.no_grad(), fixed_randomness(0):
        return task.output(model.eval()(*task.example_inputs))


def _train(given: Entry, task: Task, plan: Plan, edited: nn.Module, notes: Notes) -> None:
    """One step of gradient descent in training mode; the edited model is another one afterwards."""
    assert task.example_inputs is not None
    optimizer = torch.optim.SGD(edited.parameters(), lr=1e-3)
    loss = task.output(edited.train()(*task.example_inputs)).square().mean()
    loss.backward()
    optimizer.step()
    gradients = sum(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in edited.parameters())
    notes.add(trains=bool(torch.isfinite(loss)) and gradients > 0)


def _onnx(task: Task, edited: nn.Module, notes: Notes) -> None:
    """Export in float32, in which ONNX Runtime has all kernels, and compare with PyTorch."""
    import onnxruntime

    from tersor.export.onnx import export_onnx

    assert task.example_inputs is not None
    inputs = tuple(x.float() if x.is_floating_point() else x for x in task.example_inputs)
    single = edited.float().eval()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(single, inputs, path, dynamic_batch=False, output_of=task.output)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        named = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
        got = torch.from_numpy(session.run(None, named)[0])
    with torch.no_grad(), fixed_randomness(0):
        expected = task.output(single(*inputs))
    notes.add(onnx=relative_difference(got, expected))


if __name__ == "__main__":
    main()
