"""Proximal maps as pure functions: tensor in, tensor of the same shape out.

prox_{tJ}(x) = argmin_z  J(z) + ‖z − x‖² / (2t).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softshrink


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Move every entry of `x` towards zero by `threshold`, to zero where it was smaller: the prox of the ℓ1 norm.

    `threshold`: a number, or a tensor that broadcasts against `x` (one per layer, row or entry).
    """
    if isinstance(threshold, Tensor):
        return x - x.clamp(-threshold, threshold)
    return softshrink(x, threshold)


def nonnegative_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """max(x − threshold, 0): the prox of the ℓ1 norm on the non-negative weights."""
    return (x - threshold).clamp_min(0)


def shrink_norm(x: Tensor, norm: Tensor, threshold: float | Tensor) -> Tensor:
    """Scale `x` so that the norm of its groups falls by `threshold`, to zero where it was smaller: the group prox.

    `norm`: the norm of the group that each entry belongs to, broadcastable against `x`.
    """
    tiny = torch.finfo(x.dtype).tiny  # a zero group stays zero instead of turning into 0/0
    return x * ((norm - threshold).clamp_min(0) / norm.clamp_min(tiny))


def group_shrink(x: Tensor, threshold: float | Tensor, dim: tuple[int, ...]) -> Tensor:
    """Shrink the Euclidean norm of every group of `x` by `threshold`; a group is what varies along `dim`."""
    return shrink_norm(x, torch.linalg.vector_norm(x, dim=dim, keepdim=True), threshold)


def singular_value_shrink(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold on the singular values of the matrix `x` [m, n]: the prox of the nuclear norm."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * (s - threshold).clamp_min(0)) @ vh
