"""Augmentations: functions (x, generator) -> x of a batch of images [N, C, H, W], on its device, without a loop.

What moves into the picture is black, not the 0 of the normalised values: that would be a frame in the mean colour,
which no image of MNIST has. Black is read off the batch, as the smallest value of each channel: what the pixel value 0
became by normalisation, whenever one pixel of the batch is 0. So no augmentation needs to know mean and std.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def random_crop(x: Tensor, generator: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """Pad `x` by `pad` pixels of black, crop a random window of the old size per image; `flip` mirrors half of them."""
    if x.ndim != 4:
        raise ValueError(f"`augment`: got samples of shape {list(x.shape[1:])}; expected images [C, H, W].")
    n, c, h, w = x.shape
    width = w + 2 * pad
    padded = x.amin(dim=(0, 2, 3)).view(1, c, 1, 1).repeat(n, 1, h + 2 * pad, width)
    padded[:, :, pad : pad + h, pad : pad + w] = x
    top, left = torch.randint(2 * pad + 1, (2, n, 1), generator=generator, device=x.device)
    rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device).expand(n, w)
    if flip:
        mirrored = torch.randint(2, (n, 1), generator=generator, device=x.device, dtype=torch.bool)
        columns = torch.where(mirrored, columns.flip(1), columns)
    index = (top + rows).unsqueeze(2) * width + (left + columns).unsqueeze(1)  # [N, H, W], into the padded plane
    return padded.flatten(2).gather(2, index.view(n, 1, h * w).expand(n, c, h * w)).view(n, c, h, w)


def none(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` itself."""
    return x


def crop_flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """The usual one for CIFAR-10: shift by up to 4 pixels either way, mirror half of the images."""
    return random_crop(x, generator, pad=4, flip=True)


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift by up to 1 pixel either way; for digits, which have no mirror image."""
    return random_crop(x, generator, pad=1, flip=False)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "none": none,
    "crop-flip": crop_flip,
    "shift": shift,
}
