"""The same model through Torch-Pruning: magnitude importance, half of the channels, the last layer left alone.

``python -m benchmarks.zoo.peer suite/name NOTES``. As its documentation has it, without hints for this model; what it
gives is only asked to run: it is not compared with a masked model.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.zoo.catalogue import Entry, entry
from benchmarks.zoo.limits import budget
from benchmarks.zoo.stages import Notes, StageError
from benchmarks.zoo.worker import SEED, SPARSITY, built
from tersor.core.task import Task
from tersor.measure.compute import macs


def main() -> None:
    """Parse the command line, prune, and leave the rest to the notes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("key")
    parser.add_argument("notes", type=Path)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for all that the peer does")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    notes = Notes(arguments.notes)
    try:
        prune(entry(arguments.key), notes, limit=arguments.limit)
    except StageError:
        pass
    notes.add(peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def prune(given: Entry, notes: Notes, *, limit: float) -> None:
    """Prune with Torch-Pruning, run the result and count what is left. Raises StageError where it stops."""
    with notes.stage("build"):
        model, inputs = built(given, SEED, torch.float32)
        task = Task(model=model, example_inputs=inputs, output_of=given.output_of)
        whole = macs(model, inputs).value
        shape = _run(model, task).shape
    start = time.process_time()
    try:
        with notes.stage("prune"), budget(limit):
            _pruner(model, task, shape[1 if len(shape) == 4 else -1]).step()
    finally:
        notes.add(prune_s=time.process_time() - start)
    with notes.stage("run"):
        after = _run(model, task).shape
        if after != shape:
            raise ValueError(f"the output {list(shape)} became {list(after)}")
        notes.add(macs_left=macs(model, inputs).value / whole)
    notes.add(stage="done")


def _pruner(model: nn.Module, task: Task, classes: int):  # type: ignore[no-untyped-def]  # the library has no types
    import torch_pruning

    return torch_pruning.pruner.MetaPruner(
        model, task.example_inputs, importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=SPARSITY, ignored_layers=classifiers(model, classes), output_transform=task.output,
    )  # fmt: skip


def classifiers(model: nn.Module, classes: int) -> list[nn.Module]:
    """The layers that make outputs: linear ones and convolutions of as many features as there are classes."""
    found = []
    for module in model.modules():
        features = module.out_features if isinstance(module, nn.Linear) else None
        features = module.out_channels if isinstance(module, nn.modules.conv._ConvNd) else features
        if features == classes:
            found.append(module)
    return found


def _run(model: nn.Module, task: Task) -> Tensor:
    assert task.example_inputs is not None
    with torch.no_grad():
        return task.output(model.eval()(*task.example_inputs))


if __name__ == "__main__":
    main()
