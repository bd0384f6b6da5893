"""Group norms of a part of a weight that still know of the entries that were cut off."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..prox import shrink_norm, soft_threshold
from ..regularizers import L1, Grouped, GroupL1, Lam, SparseGroupL1, group_dims
from ..restriction.compact import Slice


@dataclass(frozen=True, eq=False, repr=False)
class CutGroups(Grouped):
    """J = λ Σ_g (α‖θ_g‖₁ + (1−α) √n_g ‖θ_g‖₂) on a part of every group, with the prox of the whole group.

    `size`: n_g of the whole group; `rest`: Σ v² over its entries that were cut off (after the ℓ1 part of the prox),
    which stay where they are; both are numbers or tensors that broadcast against the weight.
    """

    l1_ratio: float = 0.0
    weighted: bool = True
    size: Lam = 1.0
    rest: Lam = 0.0

    def __repr__(self) -> str:
        whole = GroupL1(self.groups) if not self.l1_ratio else SparseGroupL1(self.groups, self.l1_ratio)
        return f"{whole!r} of a larger weight"

    def scale(self, x: Tensor) -> float | Tensor:
        """The factor of each group's norm."""
        if not self.weighted:
            return 1.0
        return self.size.to(x) ** 0.5 if isinstance(self.size, Tensor) else self.size**0.5

    def _norms(self, y: Tensor) -> Tensor:
        rest = self.rest.to(y) if isinstance(self.rest, Tensor) else self.rest
        return (self.norms(y).square() + rest).sqrt()

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        a = self.l1_ratio
        norms = self.scale(weight) / self.sizes(weight) * self.norms(weight).expand_as(weight)
        return a * L1().value(weight, lam) + (1 - a) * (lam * norms).sum()

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        y = soft_threshold(x, step * self.l1_ratio) if self.l1_ratio else x
        return shrink_norm(y, self._norms(y), self.group_lam(step, x) * self.scale(x) * (1 - self.l1_ratio))

    def subgradient(self, weight: Tensor) -> Tensor:
        norms = self.norms(weight).clamp_min(torch.finfo(weight.dtype).tiny)
        return self.l1_ratio * weight.sign() + (1 - self.l1_ratio) * self.scale(weight) * weight / norms


def without(reg: Grouped, part: Slice, dual: Tensor | None, lam: Lam) -> Grouped:
    """The regulariser for a part of a weight whose prox is that of the whole, while v stays where it was cut off.

    `dual`: v of the whole weight (without it, what was cut off counts as zero); `lam`: λ, which says what the ℓ1 part
    leaves of it.
    """
    full = part.full
    groups = reg.groups if isinstance(reg.groups, str) else part.restrict(reg.groups.to(full.device).expand_as(full))

    def kept(entries: Tensor) -> Tensor:
        """Restricted, and for named groups one number per group."""
        small = part.restrict(entries.expand_as(full).contiguous())
        return small.amax(group_dims(groups, small.shape), keepdim=True) if isinstance(groups, str) else small

    ratio = reg.l1_ratio if isinstance(reg, SparseGroupL1) else 0.0
    v = torch.zeros_like(full) if dual is None else dual.detach()
    cut = torch.ones_like(v)
    part.prolong(torch.zeros_like(part.small, dtype=v.dtype), cut)
    squares = (cut * (soft_threshold(v, lam * ratio) if ratio else v)).square()
    rest = kept(reg.norms(squares.sqrt()).square())
    sizes = reg.sizes(v)
    size = kept(sizes) if isinstance(sizes, Tensor) else sizes
    weighted = bool(getattr(reg, "weighted", True))
    same = replace(reg, groups=groups)
    alike = not weighted or bool((torch.as_tensor(size) == torch.as_tensor(same.sizes(part.small))).all())
    if alike and not rest.any():
        return same
    return CutGroups(groups, ratio, weighted, size, rest)
