"""The quantities of the convergence theory [J, sections 2 and 4], as numbers one can look at while training.

[J] Bungert, Roith, Tenbrinck, Burger, A Bregman Learning Framework for Sparse Neural Networks, JMLR 23(192), 2022.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .optim.options import check_number
from .regularizers import Regularizer


@torch.no_grad()
def bregman_distance(
    regularizer: Regularizer,
    target: Tensor,
    source: Tensor,
    *,
    lam: float = 1.0,
    delta: float = math.inf,
    subgradient: Tensor | None = None,
) -> Tensor:
    """D_{J_δ}^p(t, s) = J(t) − J(s) − ⟨p, t − s⟩ + ‖t − s‖²/(2δ), with p ∈ ∂J(s); a scalar, zero or more.

    Args:
        regularizer, lam: J = λ·J₁.
        target, source: t and s, of one shape.
        delta: δ of the elastic net; infinite leaves the distance of J alone.
        subgradient: p, such as `v − θ/δ` of an optimizer; by default λ times the regulariser's own at s.

    Raises ValueError if the shapes differ or δ ≤ 0.
    """
    if target.shape != source.shape:
        raise ValueError(f"`target` {tuple(target.shape)} and `source` {tuple(source.shape)} must have one shape.")
    check_number("lam", lam)
    if not delta > 0:
        raise ValueError(f"Invalid `delta`: {delta!r}; expected a number > 0, or inf.")
    p = lam * regularizer.subgradient(source) if subgradient is None else subgradient
    step = target - source
    linear = (p * step).sum()
    quadratic = step.square().sum() / (2 * delta)
    return regularizer.value(target, lam) - regularizer.value(source, lam) - linear + quadratic


@torch.no_grad()
def symmetric_bregman_distance(p_target: Tensor, p_source: Tensor, target: Tensor, source: Tensor) -> Tensor:
    """⟨p_t − p_s, t − s⟩ = D^{p_s}(t, s) + D^{p_t}(s, t), a scalar."""
    return ((p_target - p_source) * (target - source)).sum()


def step_size_bound(lipschitz: float, delta: float = 1.0) -> float:
    """2/(δL): up to this τ deterministic LinBreg decreases the loss in every step, L the Lipschitz constant of ∇L."""
    check_number("lipschitz", lipschitz, strict=True)
    check_number("delta", delta, strict=True)
    return 2 / (delta * lipschitz)
