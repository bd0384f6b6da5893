"""A prox that works entry by entry, as numbers for a pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ...regularizers import Regularizer


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether λ, δ and the lists of them are equal numbers; tensors can change in place, so they never are."""
    return a == b if all(type(x) is float for x in (*a[:2], *a[2], *a[3])) else False


def intervals(reg: Regularizer | None, lam: list[Any], delta: list[Any]) -> tuple[Any, Any, Any] | None:
    """Arrays (low, high, δ) such that θ = δ·(v − clamp(v, low, high)) for every λ and δ.

    None where the prox is not of that kind, or λ or δ are tensors of several entries.
    """
    if not {*map(type, lam), *map(type, delta)} <= {float, int}:
        if any(isinstance(x, Tensor) and x.numel() != 1 for x in (*lam, *delta)):
            return None
        lam, delta = [float(x) for x in lam], [float(x) for x in delta]
    between = (0.0, 0.0) if reg is None else reg.interval(np.array(lam, dtype=float))
    return None if between is None else (*between, np.array(delta, dtype=float))
