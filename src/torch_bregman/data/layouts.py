"""Where the channels of images stand, and what their numbers count in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torch_bregman.data.errors import DataError
from torch_bregman.data.normalise import Array

FEW = (1, 2, 3, 4)  # axis lengths that are certainly channels
CHANNELS = "channels"  # the array that says "first" or "last" where the shape does not


def family(x: Array) -> str:
    """What the numbers are: the splits of a data set must agree in it."""
    return "uint8" if x.dtype == np.uint8 else "integers" if x.dtype.kind in "iu" else x.dtype.kind


def place_of_channels(what: str, x: Array, said: Array | None) -> tuple[str, str]:
    """ "first" or "last", and what has to be known of it; DataError where it has to be said.

    Of [N, a, b, c] a few a are channels, or else a few c. Otherwise the two sides that are equal are the picture's, and
    then the channels are fewer than either side.
    """
    if said is not None:
        if str(said) not in ("first", "last"):
            raise DataError(f"{what}: `{CHANNELS}` is {said}; expected 'first' or 'last'.")
        return str(said), ""
    if x.ndim < 4 or x.shape[1] in FEW:
        return "first", ""
    a, b, c = x.shape[1:]
    if c in FEW or (a == b != c):
        return "last", ""
    if b == c != a or a < min(b, c):
        return "first", ""
    if c < min(a, b):
        raise DataError(
            f"{what} has {list(x.shape)}, of which either {a} or {c} are channels; expected {CHANNELS}='last' (or "
            "'first') beside it, as in numpy.savez(…, channels='last')."
        )
    return "first", f"{a} × {b} × {c} is taken as {a} channels; say otherwise with {CHANNELS}='last'"


def as_images(arrays: Sequence[Array], channels: str) -> list[Array]:
    """[N, C, H, W] of images, [N, F] as they are; of whole numbers the range of all arrays tells the unit.

    Up to 255 they are bytes, up to 65535 shares of that; other numbers are taken as they are, as those of tables are.
    """
    if arrays[0].ndim == 2:
        return list(arrays)
    placed = [x[:, None] if x.ndim == 3 else np.moveaxis(x, 3, 1) if channels == "last" else x for x in arrays]
    if family(placed[0]) != "integers" or min(x.min() for x in placed) < 0:
        return placed
    largest = max(x.max() for x in placed)
    if largest <= 255:
        return [x.astype(np.uint8) for x in placed]
    return [(x / 65535).astype(np.float32) for x in placed] if largest <= 65535 else placed
