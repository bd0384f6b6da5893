"""The options of a parameter group: what they may be, and what the steps read from them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

#: what every method here knows, with the values that change nothing
COMMON: dict[str, Any] = {
    "lr": 1e-1, "lam": 0.0, "delta": 1.0, "weight_decay": 0.0, "maximize": False, "foreach": None, "fused": None,
}  # fmt: skip


def check_number(name: str, value: Any, low: float = 0.0, *, strict: bool = False, high: float = math.inf) -> None:
    """ValueError unless `value` is a finite number (or a tensor of such) in [low, high), or (low, high) if strict."""
    numbers = value.detach() if isinstance(value, Tensor) else torch.as_tensor(_number(name, value), dtype=torch.double)
    inside = numbers.isfinite() & ((numbers > low) if strict else (numbers >= low)) & (numbers < high)
    if not bool(inside.all()):
        bounds = f"{'>' if strict else '>='} {low:g}" + (f" and < {high:g}" if high < math.inf else "")
        raise ValueError(f"Invalid `{name}`: {value!r}; expected a finite number {bounds}.")


def _number(name: str, value: Any) -> float:
    try:
        if isinstance(value, str):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"Invalid `{name}`: {value!r}; expected a number.") from None


def as_float(lr: float | Tensor) -> float:
    """A step size as a number."""
    return lr.item() if isinstance(lr, Tensor) else lr


def coupled_decay(group: dict[str, Any]) -> float:
    """ω: what a weight adds to its gradient, as a share of the weight."""
    return 0.0 if group.get("decoupled_weight_decay") else group["weight_decay"]


def decoupled_decay(group: dict[str, Any]) -> float:
    """τω: what a weight takes off its v, as a share of the weight."""
    return as_float(group["lr"]) * group["weight_decay"] if group.get("decoupled_weight_decay") else 0.0


def dual_dtype(p: Tensor) -> torch.dtype:
    """The precision of v and of all that moves it: float32 or better."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32
