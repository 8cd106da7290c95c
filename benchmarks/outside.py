"""Two ONNX files that Tersor did not make, beside one another: torchvision's ResNet-18, and its int8 by ONNX Runtime.

    python -m benchmarks.outside            # about two minutes on a quiet core, files under runs/outside

torchvision's architecture is trained briefly on Fashion-MNIST, exported by torch.onnx and quantised by ONNX Runtime's
own static quantisation; then `tersor evaluate` compares the two files, and writes its report beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional as F

import tersor
from benchmarks.zoo.schemas import declare
from tersor.zoo.batches import TensorBatches
from tersor.zoo.fashion import DEVIATION, MEAN, fashion_images

OUT = Path("runs/outside")
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
TRAINED, EPOCHS, CALIBRATED, TESTED = 6000, 2, 128, 2000


class Samples(CalibrationDataReader):  # type: ignore[misc]
    """Batches for ONNX Runtime's calibration."""

    def __init__(self, images: Tensor):
        self.batches: Iterator[Tensor] = iter(images.split(32))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the input's name; None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def trained(images: Tensor, targets: Tensor) -> nn.Module:
    """torchvision's ResNet-18 for one channel and ten classes after a brief training."""
    declare()
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=len(CLASSES))
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    batches = TensorBatches(images, targets, 64, shuffle=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = EPOCHS * (len(images) // 64 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, total_steps=steps)
    model.train()
    for epoch in range(EPOCHS):
        for inputs, labels in batches:
            optimiser.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}")
    return model.eval()


def export(model: nn.Module, example: Tensor, path: Path) -> None:
    """The model as ONNX, batch size free, by torch.onnx."""
    shapes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.onnx.export(
        model, (example,), input_names=["images"], dynamic_shapes=(shapes["images"],), dynamo=True, verbose=False
    )
    assert program is not None
    program.save(path)


def quantized(source: Path, path: Path, images: Tensor) -> None:
    """The file in int8 by ONNX Runtime: signed weights and activations, one scale for each tensor."""
    prepared = path.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared), str(path), Samples(images), quant_format=QuantFormat.QDQ, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8, per_channel=False,
    )  # fmt: skip
    prepared.unlink()


def main(arguments: Iterable[str] | None = None) -> None:
    """Make the two files where they are not there, then evaluate them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args(None if arguments is None else list(arguments)).out
    out.mkdir(parents=True, exist_ok=True)
    original, compressed = out / "resnet18.onnx", out / "resnet18-int8.onnx"
    train, train_targets, test, test_targets = fashion_images()
    if not compressed.is_file():
        model = trained(train[:TRAINED], train_targets[:TRAINED])
        export(model, train[:2], original)
        quantized(original, compressed, train[TRAINED : TRAINED + CALIBRATED])
    task = tersor.Task(
        nn.Identity(), validation=TensorBatches(train[-TESTED:], train_targets[-TESTED:], 250),
        test=TensorBatches(test[:TESTED], test_targets[:TESTED], 250), name="Fashion-MNIST",
    )  # fmt: skip
    data = tersor.EvaluationData(task, classes=CLASSES, pixels=tersor.Pixels((MEAN,), (DEVIATION,)))
    limits = tersor.Limits(application="classification", min_agreement=0.97)
    stress = tersor.Stress(samples=200, severities=(1, 3, 5), seconds=60.0)
    found = tersor.evaluate(original, compressed, data, out, limits=limits, stress=stress)
    sizes = " and ".join(f"{path.stat().st_size / 1e6:.1f} MB" for path in (original, compressed))
    print(f"{found.gate.sentence}\n{sizes}; report: {out / 'evaluation.html'}")


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
