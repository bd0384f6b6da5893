"""The λ that leaves a number of weights alive."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .distributed import Spread, is_sharded, sum_over_parts
from .optim.base import primal
from .regularizers import turning_point


def between(values: Tensor, kept: int, beyond: int = 0) -> float | None:
    """A λ half-way between the `kept`-th and the next largest of `values`, below `beyond` others.

    Equal values are all in or all out, whichever is nearer, but never is nothing in. None where their neighbour, which
    bounds λ then, is not among the values.
    """
    # topk: kthvalue takes 100 times as long on CUDA.
    top = torch.topk(values, kept + 1, sorted=False).values
    below, above = (top.topk(2, largest=False).values if kept else top.expand(2)).tolist()
    if above == below and kept:
        larger, equal = torch.stack([(values > below).sum(), (values == below).sum()]).tolist()
        inside = kept - larger > equal / 2 or larger + beyond == 0
        rest = values[values < above] if inside else values[values > below]
        if not rest.numel():
            return None
        below, above = (float(rest.max()), above) if inside else (below, float(rest.min()))
    return half_way(below, above, values.dtype)


def half_way(below: float, above: float, dtype: torch.dtype) -> float:
    """Half-way as far as the floats allow it, for a group's norm is computed twice and may round differently."""
    middle = float(torch.tensor(below, dtype=dtype) + (above - below) / 2)
    return middle if below <= middle < above else below


def threshold_for(values: Tensor, kept: int) -> float:
    """A λ with `values` > λ for `kept` of them, or for as near a number as equal values allow."""
    kept = min(max(kept, 0), values.numel() - 1)
    # λ = 1 is what the values were measured in, so the answer is near 1 and few values need to be sorted.
    near = values[values > 0.9]
    lam = between(near, kept) if near.numel() > kept else None
    if lam is None:
        lam = between(values, kept)
    if lam is None:  # all are kept
        lam = float(values.min()) / 2
    return lam if lam > 0 else float(torch.finfo(values.dtype).tiny)


def threshold_over_ranks(values: Spread, kept: int) -> float:
    """What `threshold_for` finds, where every rank holds some of the values."""
    kept = min(max(kept, 0), values.size - 1)
    above, larger, equal = values.kth_largest(max(kept, 1))
    if kept == 0:
        lam = above
    elif larger + equal > kept and larger > 0 and kept - larger <= equal / 2:  # the equal ones are out
        lam = half_way(above, values.smallest_above(above), values.dtype)
    else:
        below = values.largest_below(above)
        lam = above / 2 if below == -math.inf else half_way(below, above, values.dtype)
    return lam if lam > 0 else float(torch.finfo(values.dtype).tiny)


def factor_by_trial(duals: list[tuple[Any, ...]], tensors: list[Tensor], kept: int) -> float:
    """The factor on λ that leaves `kept` weights, or as near a number as can be, where no threshold is known.

    `duals`: v, J, λ and δ of each part of one of the `tensors`.
    """

    def alive(factor: float) -> int:
        counts = [torch.count_nonzero(primal(v, reg, factor * lam, delta)) for v, reg, lam, delta in duals]
        return int(sum_over_parts(torch.stack(counts), tensors).sum())

    low, high = turning_point(lambda factor: alive(factor) > kept)
    if high == 0:  # all are kept
        return float(torch.finfo(torch.float32).tiny)
    below, above = alive(high), alive(low)
    return low if below == 0 or above - kept < kept - below else high


def threshold(parts: list[Tensor], tensors: list[Tensor], kept: int) -> float:
    """The λ for `kept` of the values in `parts`, which belong to the entries of the `tensors`."""
    if any(map(is_sharded, tensors)):
        return threshold_over_ranks(Spread(parts, tensors), kept)
    return threshold_for(torch.cat(parts), kept)
