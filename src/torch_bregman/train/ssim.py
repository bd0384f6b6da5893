"""How alike two images look: the structural similarity [Wang et al., 2004] of scikit-image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..data import Dataset

WINDOW = 7  # pixels; scikit-image averages over squares of this size


def similarity_on(data: Dataset) -> Callable[[Tensor, Tensor], list[float]] | None:
    """The function (made, clean) → the structural similarity of each pair of images, in [−1, 1].

    Both are pixels [N, C, H, W] in [0, 1], clipped where they are not. None where scikit-image is missing (the extra
    experiments), or where the samples of `data` are no images of at least 7×7 pixels.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    if len(data.shape) != 3 or min(data.shape[1:]) < WINDOW:
        return None

    def similarity(made: Tensor, clean: Tensor) -> list[float]:
        pairs = zip(*(x.float().cpu().clamp(0, 1).numpy() for x in (made, clean)), strict=True)
        return [float(structural_similarity(a, b, data_range=1.0, channel_axis=0)) for a, b in pairs]  # type: ignore[no-untyped-call]

    return similarity
