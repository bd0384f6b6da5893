"""How alike two images look: the structural similarity [Wang et al., 2004] of scikit-image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..data import Dataset

WINDOW = 7  # pixels; scikit-image averages over squares of this size


def similarity_on(data: Dataset) -> Callable[[Tensor, Tensor], list[float]] | None:
    """The function (made, clean) → the structural similarity of each pair of images, in [−1, 1].

    Both are [N, C, H, W], normalised as `data` is; they are compared as pixels in [0, 1], clipped. None where
    scikit-image is missing (the extra experiments), or where the samples are no images of at least 7×7 pixels.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    if len(data.shape) != 3 or min(data.shape[1:]) < WINDOW:
        return None
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))

    def pixels(x: Tensor) -> Tensor:
        return (x.float().cpu() * std + mean).clamp(0, 1)

    def similarity(made: Tensor, clean: Tensor) -> list[float]:
        pairs = zip(pixels(made).numpy(), pixels(clean).numpy(), strict=True)
        return [float(structural_similarity(a, b, data_range=1.0, channel_axis=0)) for a, b in pairs]  # type: ignore[no-untyped-call]

    return similarity
