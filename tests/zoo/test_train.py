import math

import torch

from tersor.core.progress import Progress
from tersor.zoo.batches import TensorBatches
from tersor.zoo.residual import ResidualNet
from tersor.zoo.train import Training, fit


class Counted(Progress):
    def track(self, items, description, total=None):
        self.total, self.seen = total, 0
        for item in items:
            self.seen += 1
            yield item


def test_training_learns_tells_its_progress_and_ends_in_eval_mode():
    torch.manual_seed(0)
    targets = torch.arange(60) % 3
    images = torch.randn(60, 1, 6, 6) * 0.1 + targets[:, None, None, None]
    model, progress = ResidualNet((4, 8), 1, in_channels=1, classes=3), Counted()
    fit(model, TensorBatches(images, targets, 16, shuffle=True), Training(epochs=6, peak_lr=0.1), progress, "Training")
    assert progress.seen == progress.total == 6 * math.ceil(60 / 16)
    assert not model.training and model.conv.weight.is_contiguous()
    with torch.no_grad():
        assert float((model(images).argmax(1) == targets).float().mean()) > 0.9
