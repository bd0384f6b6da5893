"""Single weights become zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prox import nonnegative_threshold, soft_threshold
from .base import Regularizer
from .traits import Lam


@dataclass(frozen=True)
class L1(Regularizer):
    """J = λ Σ|θ|. A weight is non-zero exactly where |v| > λ."""

    homogeneous = True
    unit = "entry"
    by_magnitude = True

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        return (lam * weight.abs()).sum()

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return soft_threshold(x, step)

    def subgradient(self, weight: Tensor) -> Tensor:
        return weight.sign()

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        return torch.where(weight == 0, near.clamp(-1, 1), weight.sign())

    def thresholds(self, v: Tensor) -> Tensor:
        return v.abs()

    def interval(self, lam: Any) -> tuple[Any, Any]:
        return -lam, lam


@dataclass(frozen=True)
class NonNegativeL1(Regularizer):
    """J = λ Σθ on θ ≥ 0, +∞ elsewhere: sparse weights that never turn negative."""

    homogeneous = True
    unit = "entry"

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        inside = (lam * weight).sum()
        return torch.where((weight < 0).any(), torch.full_like(inside, math.inf), inside)

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return nonnegative_threshold(x, step)

    def subgradient(self, weight: Tensor) -> Tensor:
        return (weight > 0).to(weight.dtype)

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        return torch.where(weight > 0, torch.ones_like(weight), near.clamp_max(1))

    def thresholds(self, v: Tensor) -> Tensor:
        return v.clamp_min(0)

    def interval(self, lam: Any) -> tuple[Any, Any]:
        return -math.inf, lam
