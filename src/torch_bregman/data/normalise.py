"""Normalisation in pieces: the float64 copies stay small, whatever the size of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
PIECE = 2**18  # numbers handled at once: two megabytes, which stay in the processor's cache


def pieces(x: Array, index: Array) -> Iterator[tuple[slice, Array]]:
    """The samples `index` of `x` in float64, piece by piece; uint8 becomes [0, 1]."""
    step = max(1, PIECE // max(1, x[:1].size))
    scale = 1 / 255 if x.dtype == np.uint8 else 1.0
    for start in range(0, len(index), step):
        place = slice(start, min(start + step, len(index)))
        yield place, x[index[place]].astype(np.float64) * scale


def statistics(x: Array, index: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the samples `index` of `x`, [N, C, H, W] per channel or [N, F] per feature.

    What is constant gets the standard deviation 1. Two passes, because E[x²] - E[x]² cancels where the mean is large.
    """
    axes = (0, *range(2, x.ndim))
    count = len(index) * x[0, 0].size
    mean = sum(piece.sum(axis=axes) for _, piece in pieces(x, index)) / count
    column = mean.reshape(-1, *(1,) * (x.ndim - 2))
    variance = sum(np.square(piece - column).sum(axis=axes) for _, piece in pieces(x, index)) / count
    std = np.sqrt(variance)
    return mean, np.where(std <= 1e-7 * np.abs(mean), 1.0, std)  # less than float32 can tell from rounding


def normalise(x: Array, index: Array, mean: Array, std: Array) -> Tensor:
    """(x - mean) / std of the samples `index` of `x`, as float32."""
    out = np.empty((len(index), *x.shape[1:]), dtype=np.float32)
    column = (-1, *(1,) * (x.ndim - 2))
    for place, piece in pieces(x, index):
        piece -= mean.reshape(column)
        piece /= std.reshape(column)
        out[place] = piece
    return torch.from_numpy(out)
