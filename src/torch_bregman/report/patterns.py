"""Pictures of where a weight is non-zero, and those pictures as PNG."""

import base64
import io
import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torch_bregman.extras import needs_extra

__all__ = ["page_size", "png_data_uri", "weight_pattern"]

LONG_SIDE, SHORT_SIDE = 144, 16  # pixels on a page: the most for a pattern's long side, the least for its short one

FAINTEST = 110  # of 255: what a block with hardly anything alive is drawn with, so that it is seen at all


def weight_pattern(weight: Tensor, size: int = 128) -> NDArray[np.uint8]:
    """Picture of where `weight` is non-zero, at most `size` × `size` pixels, 0 for dead and 255 for fully alive.

    `weight`: two or more dimensions, seen as a matrix (out, rest). A side that fits has one pixel per entry; a longer
    one is cut into `size` blocks as equal as possible. A pixel with share s > 0 of live weights is 110 + 145 √s: the
    square root tells 1 % from 5 %, and the floor of 110 keeps a single live weight visible in a block of any size.

    Returns uint8 of shape (min(out, size), min(rest, size)). Raises ValueError for fewer than two dimensions.
    """
    if weight.ndim < 2:
        raise ValueError(f"`weight` must have at least two dimensions, got shape {tuple(weight.shape)}")
    if size < 1:
        raise ValueError(f"`size` must be positive, got {size}")
    if weight.numel() == 0:
        return np.zeros((min(weight.shape[0], size), 0), np.uint8)
    alive = (weight.detach() != 0).flatten(1).cpu().numpy()
    starts = [np.arange(min(n, size)) * n // min(n, size) for n in alive.shape]
    area = np.outer(*(np.diff(s, append=n) for s, n in zip(starts, alive.shape, strict=True)))
    count = alive.view(np.uint8)
    for axis in (1, 0):
        if len(starts[axis]) < alive.shape[axis]:
            count = np.add.reduceat(count, starts[axis], axis=axis, dtype=np.int64)
    share = count / area
    return np.where(count > 0, np.rint(FAINTEST + (255 - FAINTEST) * np.sqrt(share)), 0).astype(np.uint8)


def page_size(picture: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) on a page, enlarged by whole factors, so that all pixels are equally large."""
    height, width = picture.shape
    factor = max(1, LONG_SIDE // max(height, width))
    across, down = (max(1, math.ceil(SHORT_SIDE / (factor * side))) * factor * side for side in (width, height))
    return across, down


def png_data_uri(picture: NDArray[np.uint8], ink: tuple[int, int, int] = (31, 127, 196)) -> str:
    """`picture` (uint8, two dimensions) as a data: address of a PNG: one ink, as opaque as the pixel is bright.

    The ground is transparent, and the ink is between light and dark, so that it reads on either.
    """
    with needs_extra("train"):
        from PIL import Image
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.putpalette(bytes(ink) * 256)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)), optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
