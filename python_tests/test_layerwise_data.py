"""Loaders of images in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerwise.data import Augmentation, TensorLoader, make_loaders
from platonic.datasets import Dataset


def image(n: int = 6, size: int = 8) -> torch.Tensor:
    return torch.arange(1.0, n * size * size + 1).view(n, 1, size, size)


def test_a_crop_is_a_window_of_the_padded_image():
    x = image(40)
    y = Augmentation(crop=2)(x, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [2] * 4)
    shifts = set()
    for before, after in zip(padded, y, strict=True):
        found = [
            (a, b) for a in range(5) for b in range(5) if torch.equal(before[:, a : a + 8, b : b + 8], after)
        ]  # fmt: skip
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 12


def test_half_of_the_images_are_mirrored():
    x = image(200)
    y = Augmentation(flip=True)(x, torch.Generator().manual_seed(0))
    mirrored = torch.tensor([torch.equal(a.flip(2), b) for a, b in zip(x, y, strict=True)])
    plain = torch.tensor([torch.equal(a, b) for a, b in zip(x, y, strict=True)])
    assert bool((mirrored ^ plain).all()) and 70 < int(mirrored.sum()) < 130


def test_cutout_sets_a_square_to_zero():
    y = Augmentation(cutout=3)(image(100), torch.Generator().manual_seed(0))
    holes = (y == 0).squeeze(1)
    assert int(holes.sum((1, 2)).max()) == 9 and int(holes.sum((1, 2)).min()) >= 4
    for hole in holes:
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        assert int(hole.sum()) == len(rows) * len(columns)
        assert int(rows.max() - rows.min()) == len(rows) - 1 and int(columns.max() - columns.min()) == len(columns) - 1


def test_every_sample_comes_once_an_epoch_in_a_new_order():
    x = torch.arange(23)
    loader = TensorLoader(x, x, 5, shuffle=True, generator=torch.Generator().manual_seed(0))
    first, second = (torch.cat([y for _, y in loader]) for _ in range(2))
    assert len(loader) == 5 == len(list(loader))
    assert (
        torch.equal(first.sort().values, x) and torch.equal(second.sort().values, x) and not torch.equal(first, second)
    )


def test_digits_are_standardised_and_split_without_overlap():
    loaders = make_loaders("digits", validation=0.2, seed=1)
    x = torch.cat([x for x, _ in loaders.train])
    assert loaders.shape == (1, 8, 8) and loaders.classes == 10
    assert x.mean().item() == pytest.approx(0, abs=1e-4) and x.std().item() == pytest.approx(1, abs=1e-4)
    parts = [loaders.train.x, loaders.validation.x, loaders.test.x]
    assert [len(p) for p in parts] == [1150, 287, 360]
    rows = torch.cat([p.flatten(1).float() for p in parts])
    assert len(rows) == 1797
    assert make_loaders("digits", validation=0).validation is None
    assert len(make_loaders("digits", limit=100, validation=20).train.y) == 80
    assert make_loaders("digits", flat=True).shape == (64,)


def test_colour_images_are_scaled_channel_by_channel():
    rng = np.random.default_rng(0)
    pixels = (rng.random((60, 4, 5, 3)) * [255, 100, 20]).round().astype(np.float32)
    labels = np.array(["cat", "dog"])[np.arange(60) % 2]
    data = Dataset("made", pixels.reshape(60, -1), labels, pixels[:8].reshape(8, -1), labels[:8], image_shape=(4, 5, 3))
    loaders = make_loaders(data, validation=10, batch_size=50)
    x, y = next(iter(loaders.train))
    assert loaders.train.x.dtype == torch.uint8 and x.shape == (50, 3, 4, 5) and loaders.names == ["cat", "dog"]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)
    back = x[0] * loaders.train.std[:, None, None] + loaders.train.mean[:, None, None]
    assert any(np.allclose(back.permute(1, 2, 0).numpy(), image, atol=1e-3) for image in pixels)
    assert set(y.tolist()) == {0, 1}


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("diabetes", {}, "expected a classification of images"),
        ("iris", {}, "or flat=True"),
        ("digits", {"validation": 5000}, "nothing to train on"),
        ("digits", {"batch_size": 0}, "batch_size"),
    ],
)
def test_what_cannot_be_loaded(data, options, message):
    with pytest.raises(ValueError, match=message):
        make_loaders(data, **options)
