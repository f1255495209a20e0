"""Step 0 of *train*: image data sets in memory as loaders of batches, with the augmentations of the source papers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from platonic.datasets import Dataset, load

__all__ = ["Augmentation", "Loaders", "TensorLoader", "make_loaders"]


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images, drawn anew for every image and epoch from the loader's generator.

    Attributes
    ----------
    crop : int
        Pixels by which an image may be shifted either way; what comes in is 0 (4 for CIFAR in the papers).
    flip : bool
        Whether half of the images are mirrored left to right.
    cutout : int
        Side of a square, centred anywhere, that is set to 0; 0 means none (14 to 16 in the papers).
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        if self.crop < 0 or self.cutout < 0:
            raise ValueError(f"Augmentation: expected crop and cutout of at least 0 pixels, got {self}")

    def __call__(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A changed copy of images (B, C, H, W)."""
        n, _, h, w = x.shape

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n,), generator=generator).to(x.device)

        if self.flip:
            x = torch.where(draw(2).bool()[:, None, None, None], x.flip(3), x)
        if self.crop:
            padded = F.pad(x, [self.crop] * 4)
            rows = draw(2 * self.crop + 1)[:, None] + torch.arange(h, device=x.device)
            columns = draw(2 * self.crop + 1)[:, None] + torch.arange(w, device=x.device)
            samples = torch.arange(n, device=x.device)[:, None, None]
            x = (
                padded.permute(0, 2, 3, 1)[samples, rows[:, :, None], columns[:, None, :]]
                .permute(0, 3, 1, 2)
                .contiguous()
            )
        if self.cutout:
            top, left = draw(h)[:, None], draw(w)[:, None]
            half = self.cutout // 2
            rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
            inside_rows = (rows >= top - half) & (rows < top - half + self.cutout)
            inside_columns = (columns >= left - half) & (columns < left - half + self.cutout)
            x = x * ~(inside_rows[:, None, :, None] & inside_columns[:, None, None, :])
        return x


class TensorLoader:
    """Batches of tensors that lie in memory; iterating draws a new order if `shuffle`.

    Parameters
    ----------
    x : Tensor
        (N, ...): inputs; of dtype uint8, images that are scaled as ``(x - mean) / std`` batch by batch.
    y : Tensor
        (N,): labels.
    batch_size : int
        Samples per batch; the last one may have fewer.
    shuffle : bool, default=False
        Whether every epoch has a new order.
    augmentation : Augmentation, optional
        Of images.
    mean, std : Tensor, optional
        (C,): of bytes.
    generator : Generator, optional
        Of orders and augmentations; None means torch's global one.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augmentation: Augmentation | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"expected as many labels as samples, got {len(y)} and {len(x)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augmentation = augmentation
        self.mean, self.std = mean, std
        self.generator = generator

    def __len__(self) -> int:
        return -(-len(self.y) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.y)
        order = torch.randperm(n, generator=self.generator).to(self.y.device) if self.shuffle else None
        for begin in range(0, n, self.batch_size):
            rows = slice(begin, begin + self.batch_size) if order is None else order[begin : begin + self.batch_size]
            x = self.x[rows]
            if self.mean is not None and self.std is not None:
                x = (x.float() - self.mean[:, None, None]) / self.std[:, None, None]
            if self.augmentation is not None:
                x = self.augmentation(x, self.generator)
            yield x, self.y[rows]


@dataclass(frozen=True)
class Loaders:
    """A data set ready to train on.

    Attributes
    ----------
    train, validation, test : TensorLoader
        Validation samples are taken from the training part (None if there are none); without a test part, a fifth of it are
        test samples.
    classes : int
        Number of classes.
    shape : tuple of int
        Of a sample.
    names : list of str
        Of the classes.
    """

    train: TensorLoader
    validation: TensorLoader | None
    test: TensorLoader
    classes: int
    shape: tuple[int, ...]
    names: list[str]


def make_loaders(
    data: str | Dataset,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 128,
    validation: int | float = 0.1,
    augmentation: Augmentation | None = None,
    limit: int | None = None,
    flat: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Loaders:
    """Loaders of an image data set, pixels scaled to mean 0 and standard deviation 1 by channel, over the training samples.

    Parameters
    ----------
    data : str or Dataset
        A name or path for :func:`platonic.datasets.load`, such as "digits", "mnist" or an image archive; or a data set.
    data_dir : path, optional
        Where named sets are.
    batch_size : int, default=128
        Of training; evaluation takes four times as many.
    validation : int or float, default=0.1
        Training samples kept for validation: a number, or a share; 0 for none.
    augmentation : Augmentation, optional
        Of training images.
    limit : int, optional
        Most training samples, validation included; drawn at random.
    flat : bool, default=False
        Samples as vectors instead of images (C, H, W).
    device : device, default="cpu"
        Where the data lies.
    seed : int, default=0
        Of the split, and of the training loader's generator.

    Raises
    ------
    ValueError
        If the data set is no classification of images, or nothing would be left to train on.
    """
    if isinstance(data, str):
        data = load(data, data_dir)
    if data.task != "classification" or (data.image_shape is None and not flat):
        raise ValueError(f"{data.name}: expected a classification of images" + ("" if flat else ", or flat=True"))
    labels, codes = np.unique(data.y_train, return_inverse=True)
    y = torch.from_numpy(codes.astype(np.int64))
    x = _images(data.X_train, data.image_shape)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    if data.X_test is None:
        cut = len(y) // 5
        x_test, y_test, order = x[order[:cut]], y[order[:cut]], order[cut:]
    else:
        assert data.y_test is not None
        x_test = _images(data.X_test, data.image_shape)
        y_test = torch.from_numpy(np.searchsorted(labels, data.y_test).astype(np.int64))
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    order = order[:limit]
    held = round(validation * len(order)) if isinstance(validation, float) else validation
    if not 0 <= held < len(order):
        raise ValueError(f"validation: {held} of {len(order)} training samples leave nothing to train on")
    kept, rest = order[:held], order[held:]
    pixels = x[rest].float()
    dims = (0, 2, 3) if x.dim() == 4 else (0, 1)
    mean, std = pixels.mean(dims), pixels.std(dims).clamp_min(1e-6)
    if x.dim() == 4 and not flat:
        parts = [x[rest], x[kept], x_test]
        scale: dict[str, Any] = {"mean": mean.to(device), "std": std.to(device)}
    else:
        view = (1, -1, 1, 1) if x.dim() == 4 else (1, 1)
        parts = [((p.float() - mean.view(view)) / std.view(view)).flatten(1) for p in (x[rest], x[kept], x_test)]
        scale = {}

    def loader(part: Tensor, labels: Tensor, size: int, **options: Any) -> TensorLoader:
        return TensorLoader(part.to(device), labels.to(device), size, **scale, **options)

    shuffled: dict[str, Any] = {"shuffle": True, "augmentation": augmentation}
    shuffled["generator"] = torch.Generator().manual_seed(seed)
    return Loaders(
        loader(parts[0], y[rest], batch_size, **shuffled),
        loader(parts[1], y[kept], 4 * batch_size) if held else None,
        loader(parts[2], y_test, 4 * batch_size),
        len(labels),
        tuple(parts[0].shape[1:]),
        [str(label) for label in labels],
    )


def _images(X: np.ndarray, shape: tuple[int, ...] | None) -> Tensor:
    """(N, C, H, W) bytes where pixels are 0 to 255, else floats; rows as they are without a shape."""
    x = torch.from_numpy(np.ascontiguousarray(X))
    whole = x.dtype == torch.uint8 or (float(x.max()) > 1 and float(x.max()) <= 255 and bool((x == x.round()).all()))
    x = x.to(torch.uint8) if whole and float(x.min()) >= 0 else x.float()
    if shape is None:
        return x
    h, w = shape[:2]
    return x.view(len(x), h, w, shape[2] if len(shape) == 3 else 1).permute(0, 3, 1, 2).contiguous()
