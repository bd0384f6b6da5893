"""The rank of a weight becomes low."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..prox import singular_value_shrink
from .base import Regularizer
from .traits import Lam


@dataclass(frozen=True)
class NuclearNorm(Regularizer):
    """J = λ Σ σ_i, the singular values of the weight as a matrix (out, rest): low rank.

    Args:
        rtol: singular values up to rtol·σ_max count as zero; by default max(m, n)·ε of the dtype.
        prox_every: a singular value decomposition takes far longer than a step. With k > 1 LinBreg and AdaBreg compute
            it at every k-th step only: v moves in every step, θ stands still in between, so k gradients are taken at
            the same weights, as with a k times larger batch. What is written is exactly prox_{δJ}(δv). ProxSGD, which
            has no v, takes it at every step.
    """

    rtol: float | None = None
    prox_every: int = field(default=1, repr=False)  # no part of J: a run may go on with another

    homogeneous = True
    unit = "rank"
    countable = False
    costly = True

    def __post_init__(self) -> None:
        if isinstance(self.prox_every, bool) or not isinstance(self.prox_every, int) or self.prox_every < 1:
            raise ValueError(f"`prox_every` is {self.prox_every!r}: expected a whole number of at least 1.")

    def check(self, shape: torch.Size) -> None:
        if len(shape) < 2:
            raise ValueError(f"NuclearNorm needs a weight with at least 2 dimensions; got shape {tuple(shape)}.")

    def _svd(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The compact decomposition: only the singular values that are not numerically zero."""
        u, s, vh = torch.linalg.svd(x.flatten(1), full_matrices=False)
        rtol = self.rtol if self.rtol is not None else max(x.flatten(1).shape) * torch.finfo(x.dtype).eps
        rank = int((s > rtol * s[:1]).sum())
        return u[:, :rank], s[:rank], vh[:rank]

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        self._check_lam(lam)
        return lam * torch.linalg.matrix_norm(weight.flatten(1), ord="nuc")

    @staticmethod
    def _check_lam(lam: Lam) -> None:
        if isinstance(lam, Tensor) and lam.numel() != 1:
            raise ValueError(f"`lam` of shape {tuple(lam.shape)}: NuclearNorm takes one λ for the whole weight.")

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        self._check_lam(step)
        return singular_value_shrink(x.flatten(1), step).view_as(x)

    def subgradient(self, weight: Tensor) -> Tensor:
        # U_r V_rᵀ, not the full U Vᵀ: that would put every zero singular value on the threshold.
        u, _, vh = self._svd(weight)
        return (u @ vh).view_as(weight)

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        # ∂J₁ = {U_r V_rᵀ + W : W orthogonal to both spaces, σ(W) ≤ 1}.
        u, _, vh = self._svd(weight)
        rest = near.flatten(1)
        rest = rest - u @ (u.mT @ rest)
        rest = rest - (rest @ vh.mT) @ vh
        return (u @ vh + rest - singular_value_shrink(rest, 1.0)).view_as(weight)

    def thresholds(self, v: Tensor) -> Tensor:
        """Every entry: the largest singular value, for rank and not entries is what λ controls here."""
        return torch.linalg.matrix_norm(v.flatten(1), ord=2).expand(v.shape)

    def alive(self, weight: Tensor) -> Tensor:
        """The rank over the largest possible one: a weight of low rank has few zeros and is sparse all the same."""
        return torch.tensor(self.rank(weight) / max(min(weight.flatten(1).shape), 1))

    def rank(self, weight: Tensor) -> int:
        """The numerical rank of the weight as a matrix (out, rest)."""
        return int(self._svd(weight)[1].numel())
