"""The optimizer that another tool has wrapped."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def unwrapped(optimizer: Any) -> Any:
    """The optimizer itself, where accelerate, Transformers or Lightning hand over an object round it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
