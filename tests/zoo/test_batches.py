import numpy as np
import torch

from tersor.zoo.batches import TensorBatches, flip, shift


def numbered(count=10):
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 2, 2).contiguous()
    return images, torch.arange(count)


def test_every_sample_comes_once_with_its_own_target_and_the_last_batch_is_smaller():
    batches = TensorBatches(*numbered(), batch_size=4, shuffle=True)
    seen = list(batches)
    assert [len(targets) for _, targets in seen] == [4, 4, 2] and len(batches) == 3
    for images, targets in seen:
        assert torch.equal(images[:, 0, 0, 0], targets.float())
    assert sorted(torch.cat([targets for _, targets in seen]).tolist()) == list(range(10))


def test_order_is_plain_without_shuffle_and_follows_the_global_seed_with_it():
    plain = TensorBatches(*numbered(), batch_size=10)
    assert next(iter(plain))[1].tolist() == list(range(10))
    shuffled = TensorBatches(*numbered(), batch_size=10, shuffle=True)
    orders = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        orders.append(next(iter(shuffled))[1].tolist())
    assert orders[0] == orders[1] != orders[2]


def test_each_iteration_draws_anew_and_leaves_the_images_alone():
    images, targets = numbered()
    before = images.clone()
    batches = TensorBatches(images, targets, 10, shuffle=True, augment=lambda batch: batch.add_(1))
    torch.manual_seed(0)
    first, second = next(iter(batches)), next(iter(batches))
    assert first[1].tolist() != second[1].tolist()
    assert torch.equal(images, before)


def test_shift_moves_each_image_by_its_own_offset_and_repeats_the_border():
    torch.manual_seed(0)
    images = torch.randn(200, 2, 5, 6)
    shifted = shift(images, 1)
    assert shifted.shape == images.shape and shifted.is_contiguous()
    offsets = set()
    for image, moved in zip(images.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
        fits = [
            (dy, dx) for dy in range(3) for dx in range(3) if np.array_equal(padded[:, dy : dy + 5, dx : dx + 6], moved)
        ]
        assert len(fits) == 1
        offsets.add(fits[0])
    assert len(offsets) == 9


def test_flip_mirrors_about_half_of_the_images():
    torch.manual_seed(0)
    images = torch.randn(400, 1, 3, 4)
    flipped = flip(images)
    mirrored = [torch.equal(image.flip(-1), got) for image, got in zip(images, flipped, strict=True)]
    kept = [torch.equal(image, got) for image, got in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 160 < sum(mirrored) < 240
