"""Whole groups of weights become zero: neurons, kernels, filters, channels, or groups of one's own."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..distributed import Shards
from ..part import Piece
from ..prox import shrink_norm, soft_threshold
from .base import Regularizer, bisect, broadcasts
from .l1 import L1
from .traits import GroupNorm, Lam

#: name → (what it belongs to, the dimensions that a group spans, given the number of dimensions)
GROUPS: dict[str, tuple[str, Callable[[int], tuple[int, ...]]]] = {
    "rows": ("a Linear weight [out, in]", lambda ndim: (1,)),
    "columns": ("a Linear weight [out, in]", lambda ndim: (0,)),
    "kernels": ("a Conv weight [out, in, *kernel]", lambda ndim: tuple(range(2, ndim))),
    "filters": ("a Conv weight [out, in, *kernel]", lambda ndim: tuple(range(1, ndim))),
    "channels": ("a Conv weight [out, in, *kernel]", lambda ndim: (0, *range(2, ndim))),
}


def group_dims(groups: str, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions that one group spans in a weight of `shape`; ValueError where the two do not fit."""
    if groups not in GROUPS:
        raise ValueError(f"`groups` is {groups!r}: expected one of {', '.join(map(repr, GROUPS))} or an index tensor.")
    owner, dims = GROUPS[groups]
    if (len(shape) == 2) != ("Linear" in owner) or len(shape) < 2:
        raise ValueError(f"`groups` is {groups!r}, which needs {owner}; got a tensor of shape {tuple(shape)}.")
    return dims(len(shape))


@dataclass(frozen=True, eq=False)
class Grouped(Regularizer):
    """Shared by the group regularisers: which entries belong together, their norms and sizes."""

    groups: str | Tensor = "rows"
    shards: Shards | None = field(default=None, kw_only=True, repr=False)  # set by `on_shards`

    homogeneous = True
    sums = True

    def __post_init__(self) -> None:
        if isinstance(self.groups, str):
            if self.groups not in GROUPS:
                group_dims(self.groups, (1, 1))
        elif not isinstance(self.groups, Tensor) or self.groups.dtype.is_floating_point or self.groups.dtype.is_complex:
            raise ValueError(f"`groups` is {self.groups!r}: expected a name or a tensor of integer group numbers.")
        elif self.groups.numel() == 0 or int(self.groups.min()) < 0:
            raise ValueError("`groups` as a tensor must hold group numbers 0, 1, 2, …: found an empty or negative one.")

    def check(self, shape: torch.Size) -> None:
        if isinstance(self.groups, str):
            group_dims(self.groups, shape)
        elif not broadcasts(self.groups.shape, shape):
            raise ValueError(
                f"`groups` has shape {tuple(self.groups.shape)}, which does not fit a weight {tuple(shape)}."
            )

    def __repr__(self) -> str:
        groups = self.groups
        if isinstance(groups, Tensor):  # two indices of one shape are two regularisers
            groups = f"<index {tuple(groups.shape)} {zlib.crc32(groups.cpu().long().numpy().tobytes()):08x}>"
        others = [f.name for f in fields(self) if f.repr and f.name != "groups"]
        rest = "".join(f", {name}={getattr(self, name)!r}" for name in others)
        return f"{type(self).__name__}(groups={groups!r}{rest})"

    @property
    def unit(self) -> str:  # type: ignore[override]
        return self.groups.removesuffix("s") if isinstance(self.groups, str) else "group"

    def spans(self, shape: torch.Size) -> tuple[int, ...] | None:
        return group_dims(self.groups, shape) if isinstance(self.groups, str) else None

    def restricted(self) -> Grouped:
        return replace(self, groups="rows")

    def norms(self, x: Tensor) -> Tensor:
        """The Euclidean norm of the group of every entry, broadcastable against `x`."""
        if isinstance(self.groups, str):
            dims = group_dims(self.groups, x.shape)
            if self.shards is None:
                return torch.linalg.vector_norm(x, dim=dims, keepdim=True)
            return self.shards.sum(x.square().sum(dims, keepdim=True)).sqrt()
        squares = self._per_group(x.square())
        # Where a group is zero the root has no derivative; autograd (the Lasso) shall find 0 there and not 0/0.
        return torch.where(squares == 0, 0.0, torch.where(squares == 0, 1.0, squares).sqrt())

    def group_lam(self, lam: Lam, x: Tensor) -> Lam:
        """One λ per group: a tensor λ counts by its mean over the group."""
        if not isinstance(lam, Tensor) or lam.numel() == 1:
            return lam
        lam = lam.to(x).expand_as(x)
        if isinstance(self.groups, str):
            return lam.mean(dim=group_dims(self.groups, x.shape), keepdim=True)
        return self._per_group(lam) / self.sizes(x)

    def sizes(self, x: Tensor) -> float | Tensor:
        """The number of entries in the group of every entry."""
        if isinstance(self.groups, str):
            shape = x.shape if self.shards is None else self.shards.shape
            return float(math.prod(shape[d] for d in group_dims(self.groups, shape)))
        return self._per_group(torch.ones_like(x))

    def coupled(self, mask: Tensor) -> Tensor:
        if isinstance(self.groups, str):
            touched = mask.any(dim=group_dims(self.groups, mask.shape), keepdim=True)
            if self.shards is not None:
                touched = self.shards.sum(touched.int()) > 0
            return touched.expand_as(mask)
        return self._per_group(mask.float()) > 0

    def _per_group(self, x: Tensor) -> Tensor:
        """Sum over each index group, written back to every entry of it."""
        assert isinstance(self.groups, Tensor)
        index = self.groups.to(x.device, torch.int64)
        if self.shards is None:
            self.check(x.shape)
            index = index.expand_as(x)
        else:
            index = self.shards.part(index.expand(self.shards.shape).contiguous())
        sums = torch.zeros(int(self.groups.max()) + 1, dtype=x.dtype, device=x.device)
        sums.index_add_(0, index.reshape(-1), x.reshape(-1))
        return (sums if self.shards is None else self.shards.sum(sums))[index]

    def cut(self, part: Piece, dual: Tensor | None, lam: Lam) -> Grouped:
        """The same J where it is the same, else one that knows of the entries that were cut off."""
        full = part.full
        groups = self.groups
        if isinstance(groups, Tensor):
            groups = part.restrict(groups.to(full.device).expand_as(full))

        def kept(entries: Tensor) -> Tensor:
            """Restricted, and for named groups one number per group."""
            small = part.restrict(entries.expand_as(full).contiguous())
            return small.amax(group_dims(groups, small.shape), keepdim=True) if isinstance(groups, str) else small

        ratio = float(getattr(self, "l1_ratio", 0.0))
        v = torch.zeros_like(full) if dual is None else dual.detach()
        gone = torch.ones_like(v)
        part.prolong(torch.zeros_like(part.small, dtype=v.dtype), gone)
        squares = (gone * (soft_threshold(v, lam * ratio) if ratio else v)).square()
        rest = kept(self.norms(squares.sqrt()).square())
        sizes = self.sizes(v)
        size = kept(sizes) if isinstance(sizes, Tensor) else sizes
        weighted = bool(getattr(self, "weighted", True))
        same = replace(self, groups=groups)
        alike = not weighted or bool((torch.as_tensor(size) == torch.as_tensor(same.sizes(part.small))).all())
        if alike and not rest.any():
            return same
        return CutGroups(groups, ratio, weighted, size, rest)

    def on_shards(self, shards: Shards) -> Regularizer:
        if isinstance(self.groups, Tensor):
            return replace(self, shards=shards)
        cutting = shards.cutting(group_dims(self.groups, shards.shape))
        return replace(self, shards=cutting) if cutting.across else self


@dataclass(frozen=True, eq=False, repr=False)
class GroupL1(Grouped):
    """J = λ Σ_g √n_g ‖θ_g‖₂: whole groups are zero or alive together.

    `groups`: "rows" (output neurons) and "columns" (input features) of a Linear; "kernels" (out, in), "filters" (out)
    and "channels" (in) of a Conv; or a tensor of group numbers that broadcasts against the weight.
    `weighted`: False drops the factor √n_g.
    """

    weighted: bool = True

    def group_norm(self) -> GroupNorm | None:
        return GroupNorm(self.groups, 0.0, self.weighted) if isinstance(self.groups, str) else None

    def scale(self, x: Tensor) -> float | Tensor:
        """The factor of each group's norm: √n_g, or 1."""
        return self.sizes(x) ** 0.5 if self.weighted else 1.0

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        if not weight.numel():
            return weight.sum()
        # Every entry carries its group's norm, so each is divided by the group's size before the sum.
        share = self.scale(weight) / self.sizes(weight)
        return (lam * share * self.norms(weight).expand_as(weight)).sum()

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return shrink_norm(x, self.norms(x), self.group_lam(step, x) * self.scale(x))

    def subgradient(self, weight: Tensor) -> Tensor:
        return self.scale(weight) * weight / self.norms(weight).clamp_min(torch.finfo(weight.dtype).tiny)

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        scale, tiny = self.scale(near), torch.finfo(near.dtype).tiny
        ball = near * (scale / self.norms(near).clamp_min(tiny)).clamp_max(1)  # ∂J₁(0): each group's norm ≤ √n_g
        return torch.where(self.norms(weight) == 0, ball, self.subgradient(weight))

    def thresholds(self, v: Tensor) -> Tensor:
        # An entry whose v is exactly zero stays zero in a live group.
        return torch.where(v == 0, 0.0, self.norms(v) / self.scale(v))


@dataclass(frozen=True, eq=False, repr=False)
class SparseGroupL1(Grouped):
    """J = λ (α‖θ‖₁ + (1−α) Σ_g √n_g ‖θ_g‖₂), α = `l1_ratio`: few groups, and few weights within them."""

    l1_ratio: float = 0.5
    weighted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.l1_ratio <= 1:
            raise ValueError(f"`l1_ratio` is {self.l1_ratio!r}: expected a number from 0 to 1.")

    def group_norm(self) -> GroupNorm | None:
        return GroupNorm(self.groups, self.l1_ratio, self.weighted) if isinstance(self.groups, str) else None

    @property
    def _group(self) -> GroupL1:
        return GroupL1(self.groups, self.weighted, shards=self.shards)

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        a = self.l1_ratio
        return a * L1().value(weight, lam) + (1 - a) * self._group.value(weight, lam)

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return self._group.prox(soft_threshold(x, step * self.l1_ratio), step * (1 - self.l1_ratio))

    def subgradient(self, weight: Tensor) -> Tensor:
        a = self.l1_ratio
        return a * weight.sign() + (1 - a) * self._group.subgradient(weight)

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        # In a live group a zero entry may hold anything up to α; a zero group holds near − prox(near, 1) (Moreau).
        a, live = self.l1_ratio, self.norms(weight) > 0
        inside = torch.where(weight == 0, near.clamp(-a, a), self.subgradient(weight))
        return torch.where(live, inside, near - self.prox(near, 1.0))

    def thresholds(self, v: Tensor) -> Tensor:
        # An entry is alive while it passes the ℓ1 part and its group's soft-thresholded norm passes the group part.
        # The second is bisected, with one λ for all entries of a group.
        if self.l1_ratio == 0:
            return self._group.thresholds(v)
        norms = self.norms(v).expand_as(v)
        high = norms / (self.l1_ratio if self.l1_ratio == 1 else min(self.l1_ratio, 1 - self.l1_ratio))
        whole = bisect(lambda lam: self.norms(self.prox(v, lam)).expand_as(v) > 0, torch.zeros_like(v), high)
        return torch.minimum(v.abs() / self.l1_ratio, whole)


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
