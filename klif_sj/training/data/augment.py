"""Augment whole batches on their own device. Every batch gets new random numbers, the same ones on every device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..._checks import nearest
from .catalogue import DatasetInfo

__all__ = ["AUGMENTATIONS", "Augmentation", "crop", "cutout", "flip"]

PADDING = 4
"""Black pixels on each side before a crop."""

AUGMENTATIONS = {
    "crop": f"a window of the image's own size out of the image padded by {PADDING} black pixels on each side",
    "flip": "left and right exchanged, in one image of two",
    "cutout": "a square of half the image's side erased around a random pixel, cut off at the border",
    "normalise": "channels shifted and scaled to mean 0 and variance 1 over the training set; of the test set too",
}


class Augmentation:
    """Turns stored samples into network inputs: float32, with pixels in [0, 1] or, with 'normalise', standardised.

    The random numbers depend on ``(seed, epoch, batch, rank)`` alone, and not on the chosen augmentations. The order is
    always crop, flip, normalise, cutout, however they are named. So cutout erases to the mean colour if images are
    normalised. All time steps of a recording are augmented alike.

    :param names: some names of :data:`AUGMENTATIONS`
    :param info: the data set

    :raises ValueError: for an unknown name, or 'normalise' for events, whose counts are fed as they are
    """

    def __init__(self, names: Sequence[str], info: DatasetInfo) -> None:
        for name in names:
            if name not in AUGMENTATIONS:
                known = ", ".join(AUGMENTATIONS)
                raise ValueError(f"augmentation: expected some of {known}, got {name!r}{nearest(name, AUGMENTATIONS)}")
        if "normalise" in names and not info.mean:
            raise ValueError(f"augmentation: 'normalise' is for images; {info.title} holds counts of events")
        self.names = frozenset(names)
        self.scale = 255 if info.kind == "image" else 1
        self.mean = torch.tensor(info.mean).view(-1, 1, 1)
        self.std = torch.tensor(info.std).view(-1, 1, 1)

    def __call__(self, x: Tensor, draw: tuple[int, int, int, int] | None) -> Tensor:
        """The network inputs for samples ``[N, C, H, W]`` or ``[N, T, C, H, W]``.

        :param draw: seed, epoch, batch and rank; None leaves out all random augmentations
        """
        random = None if draw is None else _draw(draw, x)
        if random is not None and "crop" in self.names:
            x = crop(x, random[:, 0:2], PADDING)
        if random is not None and "flip" in self.names:
            x = flip(x, random[:, 2] == 1)
        if not x.is_floating_point():
            x = x.float() / self.scale if self.scale > 1 else x.float()
        if "normalise" in self.names:
            x = (x - self.mean.to(x.device)) / self.std.to(x.device)
        if random is not None and "cutout" in self.names:
            x = cutout(x, random[:, 3:5], x.shape[-1] // 2)
        return x


def _draw(draw: tuple[int, int, int, int], x: Tensor) -> Tensor:
    """A crop's offsets, whether to flip, and a cutout's centre: ``[N, 5]``, so that one copy to the device suffices."""
    size = x.shape[-1]
    above = [2 * PADDING + 1, 2 * PADDING + 1, 2, size, size]
    return torch.from_numpy(np.random.default_rng(draw).integers(0, above, (len(x), 5))).to(x.device, non_blocking=True)


def crop(x: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """A window of each zero-padded sample, of the sample's own size, from its offset ``[N, 2]`` (row, column) on."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (padding,) * 4).flatten(1, -3)
    sample = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    rows = (offsets[:, 0, None] + torch.arange(height, device=x.device)).unsqueeze(2)
    columns = (offsets[:, 1, None] + torch.arange(width, device=x.device)).unsqueeze(1)
    return padded[sample, :, rows, columns].movedim(-1, 1).reshape(x.shape)


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """The ``chosen`` samples, ``[N]`` bool, mirrored left to right."""
    return torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)


def cutout(x: Tensor, centres: Tensor, size: int) -> Tensor:
    """The samples with zeros in a square of ``size`` pixels a side around their centres ``[N, 2]``.

    The square is cut off at the borders. It reaches from ``centre - size // 2`` to ``centre + size // 2``, exclusive
    (DeVries and Taylor, 2017).
    """
    within = [
        (torch.arange(length, device=x.device) - centres[:, axis, None] + size // 2).ge(0)
        & (torch.arange(length, device=x.device) - centres[:, axis, None] - size // 2).lt(0)
        for axis, length in enumerate(x.shape[-2:])
    ]
    square = within[0].unsqueeze(2) & within[1].unsqueeze(1)
    return x.masked_fill(square.view(len(x), *[1] * (x.dim() - 3), *square.shape[1:]), 0)
