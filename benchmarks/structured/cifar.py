"""CIFAR-10: Tersor and Torch-Pruning prune the same ResNet to the same MACs and train on with the same budget.

    python -m benchmarks.structured.cifar --epochs 4 --seeds 2
    python -m benchmarks.structured.cifar --model resnet56 --device cuda --epochs 100 --seeds 3

Each finished arm is a line of JSON under runs/bench-structured; what stands there is not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch_pruning
from torch import nn

from benchmarks.results import Finished, Log
from benchmarks.structured.arms import Arm, Pruned, TersorArm, TorchPruningArm
from benchmarks.structured.data import cifar10
from benchmarks.structured.report import Setting, write_page
from benchmarks.structured.training import Budget, checksum, correct, mean_of, subset, task_of, train
from tersor.core.files import cache_folder
from tersor.core.progress import Progress
from tersor.distill.response import Distill
from tersor.prune.structured.scores import Magnitude
from tersor.train.objective import Objective, TaskLoss
from tersor.zoo.cache import cache_path, trained_once
from tersor.zoo.cifar import Images, trained_resnet20
from tersor.zoo.resnet_cifar import CifarResNet

OUT = Path("runs/bench-structured")
ORIGINAL = Budget(epochs=200, lr=0.1)


@dataclass(frozen=True)
class Entry:
    """A column of the table: a way to prune, and what is made small afterwards."""

    name: str
    arm: Arm
    objective: Objective = TaskLoss()


def _norm(normalizer: str, everywhere: bool) -> TorchPruningArm:
    importance = partial(torch_pruning.importance.GroupMagnitudeImportance, p=2, normalizer=normalizer)
    return TorchPruningArm(importance, f"GroupMagnitudeImportance(p=2, normalizer={normalizer!r})", everywhere)


# Torch-Pruning by its own benchmark's methods `group_norm` and (without its regularised training) `group_sl`, and by
# the same fraction in every layer, which is stronger where training is short.
ENTRIES = {
    "torch-pruning": Entry("Torch-Pruning", _norm("mean", True)),
    "torch-pruning-max": Entry("Torch-Pruning, max", _norm("max", True)),
    "torch-pruning-layer": Entry("Torch-Pruning, layer", _norm("mean", False)),
    "tersor": Entry("Tersor", TersorArm()),
    "tersor-layer": Entry("Tersor, layer", TersorArm(scope="layer")),
    "tersor-magnitude": Entry(
        "Tersor, layer, magnitude",
        TersorArm(Magnitude(members="all"), scope="layer", repair=False),
    ),
    "tersor-distilled": Entry("Tersor, distilled", TersorArm(), Distill()),
}


def main() -> None:
    """Prune, train on, evaluate the last epoch, write docs/benchmarks/structured-MODEL.md."""
    args = _arguments()
    device, budget = torch.device(args.device), Budget(args.epochs, args.lr)
    training, test = cifar10()
    images = subset(training, args.train_samples)
    original = _original(args.model, training, device)
    right = correct(original, test, device)
    print(f"{args.model}: {mean_of(right):.2f} %", flush=True)
    log = Log(args.out / f"{args.model}.jsonl", {"model": args.model, "images": len(images), "device": device.type})
    task = task_of(original, training, test)
    entries = [ENTRIES[name] for name in args.arms]
    pruned = {(entry.arm, ratio): entry.arm.prune(task, ratio) for ratio in args.ratios for entry in entries}
    found: dict[tuple[str, float], list[Finished]] = {}
    for seed, ratio, entry in product(range(args.seeds), args.ratios, entries):
        start = pruned[entry.arm, ratio]

        def run(start: Pruned = start, entry: Entry = entry, seed: int = seed) -> Finished:
            model, seconds = train(start.model, images, budget, seed, device, entry.objective, original)
            return Finished(start.ratio, start.seconds, seconds, correct(model, test, device))

        settings = {
            "entry": entry.name, "arm": str(entry.arm), "objective": str(entry.objective), "ratio": ratio,
            "weights": checksum(start.model), "seed": seed, **asdict(budget),
        }  # fmt: skip
        done = log.once(settings, run)
        found.setdefault((entry.name, ratio), []).append(done)
        print(
            f"seed {seed}, {ratio}×, {entry.name}: {done.accuracy:.2f} % at {done.ratio:.3f}×, "
            f"pruned in {done.pruning:.0f} s, trained in {done.training:.0f} s",
            flush=True,
        )
    setting = Setting(args.model, len(images), budget, args.seeds, _name(device), "benchmarks/structured/cifar.py")
    said = {entry.name: f"{entry.arm}; then {entry.objective}" for entry in entries}
    ours = [ENTRIES[name].name for name in args.arms if name.startswith("tersor")]
    write_page(setting, mean_of(right), said, ours, found)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("resnet20", "resnet56"), default="resnet20")
    parser.add_argument("--epochs", type=int, default=4, help="of training after pruning, in every arm")
    parser.add_argument("--lr", type=float, default=0.02, help="peak learning rate, in every arm")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ratios", type=float, nargs="+", default=(2.1, 2.5), help="times fewer MACs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 …")
    parser.add_argument("--train-samples", type=int, default=None, help="fewer images, to try it out")
    parser.add_argument("--arms", nargs="+", choices=ENTRIES, default=tuple(ENTRIES))
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def _original(name: str, training: Images, device: torch.device) -> nn.Module:
    """The trained network: the checkpoint, or the one that is trained here once and kept in Tersor's cache."""
    depth = int(name.removeprefix("resnet"))
    found = trained_resnet20() if depth == 20 else None
    if found is not None:
        return found
    torch.manual_seed(0)
    model = CifarResNet(depth)
    path = cache_path(cache_folder(), f"cifar10-{name}", model, {"version": 1, **asdict(ORIGINAL)})

    def fit() -> None:
        print(f"Training {name}, once: {ORIGINAL}", flush=True)
        trained, _ = train(model, training, ORIGINAL, 0, device)
        model.load_state_dict(trained.state_dict())

    trained_once(model, path, fit, Progress())
    return model.eval()


if __name__ == "__main__":
    main()
