"""What J is. A regulariser is J = λ·J₁ with λ held by the optimizer; here is J₁, as a few small methods.

Your own is a subclass of `Regularizer` with `value`, `prox` and `subgradient`; everything else has a default
that works for it (see CONTRIBUTING.md).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .distributed import Shards
from .prox import nonnegative_threshold, shrink_norm, singular_value_shrink, soft_threshold

Lam = float | Tensor


class Regularizer:
    """A convex J = λ·J₁ on one weight tensor. All results are shaped like the weight, except `value` (a scalar)."""

    #: J₁(c·θ) = c·J₁(θ) for c > 0. Then prox_{δJ}(δv) = δ·prox_J(v): δ scales the weights, never the support.
    homogeneous: bool = False
    #: LinBreg and AdaBreg write θ at every so many steps, for a prox that costs more than the step itself.
    prox_every: int = 1
    #: Is the prox so dear that a checksum of θ is kept, instead of computing it again to see whether θ has changed?
    costly: bool = False
    #: Where the weight is a part of a DTensor: the other parts that the prox of this one needs, if it needs any.
    shards: Shards | None = None

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        """J(θ) = λ·J₁(θ)."""
        raise NotImplementedError

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        """argmin_z  step·J₁(z) + ‖z − x‖²/2, where an optimizer passes step = δ·λ. Zeros come out exactly zero."""
        raise NotImplementedError

    def subgradient(self, weight: Tensor) -> Tensor:
        """An element of ∂J₁(θ), zero wherever zero is allowed: the p of a start that remembers nothing."""
        raise NotImplementedError

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        """The element of ∂J₁(θ) closest to `near`: keeps what the dual remembers about weights that are zero."""
        # near − prox(near, 1) projects on ∂J₁(0) for a homogeneous J (Moreau), and leads there for any other.
        for _ in range(1 if self.homogeneous else 100):
            outside = self.prox(near, 1.0)
            near = near - outside
            if not self.homogeneous and not bool(outside.any()):
                break
        fresh = self.subgradient(weight)
        p = torch.where(weight == 0, near, fresh)
        # θ = prox(θ + p, 1) says that p ∈ ∂J₁(θ). A zero in a live group may hold nothing, for example.
        revived = (weight == 0) & (self.prox(weight + p * (1 - 4 * torch.finfo(p.dtype).eps), 1.0) != 0)
        return torch.where(revived, fresh, p)

    def coupled(self, mask: Tensor) -> Tensor:
        """The entries whose subgradient depends on an entry in `mask`; by default one entry touches them all."""
        return mask.any().expand_as(mask)

    def thresholds(self, v: Tensor) -> Tensor:
        """For every entry the smallest λ at which prox(v, λ) is zero there: θ ≠ 0 while λ is below, to rounding.

        The default bisects entry by entry, for a J whose entries stand alone; groups need their own.
        """
        high = torch.full_like(v, max(float(v.abs().max()), 1e-30)) if v.numel() else v.clone()
        for _ in range(40):
            alive = self.prox(v, float(high.max()) if high.numel() else 1.0) != 0
            if not bool(alive.any()):
                break
            high = high * 2
        return _bisect(lambda lam: self.prox(v, lam) != 0, torch.zeros_like(v), high)

    def lambda_max(self, v: Tensor) -> Tensor:
        """The smallest λ at which prox(v, λ) is zero everywhere (the dual norm of `v` for a norm), a scalar tensor."""
        return self.thresholds(v).max() if v.numel() else v.sum()

    def interval(self, lam: Any) -> tuple[Any, Any] | None:
        """(low, high) if prox(x, λ) = x − clamp(x, low, high) entry by entry, so that one pass can compute it.

        `lam`: a number, or an array of them. None, the default, for every other J.
        """
        return None

    def alive(self, weight: Tensor) -> Tensor:
        """The share of `weight` that is alive, a scalar tensor: non-zero over all entries."""
        return torch.count_nonzero(weight) / max(weight.numel(), 1)

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError if a weight of this shape cannot be regularised."""

    def on_shards(self, shards: Shards) -> Regularizer:
        """J on one rank's part of a DTensor: itself where entries stand alone, else it gathers the weight every time.

        They stand alone where a class defines `coupled`; one whose `coupled` links entries defines this method as well.
        """
        return Gathered(self, shards) if type(self).coupled is Regularizer.coupled else self


class Gathered(Regularizer):
    """A J that needs the whole weight, on one rank's part of it. All ranks compute the same and keep their parts."""

    shards: Shards

    def __init__(self, whole: Regularizer, shards: Shards) -> None:
        self.J, self.shards = whole, shards
        self.homogeneous, self.prox_every, self.costly = whole.homogeneous, whole.prox_every, whole.costly

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return self.shards.part(self.J.prox(self.shards.whole(x), step))

    def subgradient(self, weight: Tensor) -> Tensor:
        return self.shards.part(self.J.subgradient(self.shards.whole(weight)))

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        return self.shards.part(self.J.nearest_subgradient(self.shards.whole(weight), self.shards.whole(near)))

    def coupled(self, mask: Tensor) -> Tensor:
        return self.shards.part(self.J.coupled(self.shards.whole(mask)))

    def thresholds(self, v: Tensor) -> Tensor:
        return self.shards.part(self.J.thresholds(self.shards.whole(v)))

    def alive(self, weight: Tensor) -> Tensor:
        return self.J.alive(self.shards.whole(weight))


def _bisect(alive: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Per entry, the λ in [low, high] where `alive(λ)` turns false, to the last float."""
    for _ in range(60):
        middle = (low + high) / 2
        up = alive(middle)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return high


@dataclass(frozen=True)
class L1(Regularizer):
    """J = λ Σ|θ|. A weight is non-zero exactly where |v| > λ."""

    homogeneous = True

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        return (lam * weight.abs()).sum()

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return soft_threshold(x, step)

    def subgradient(self, weight: Tensor) -> Tensor:
        return weight.sign()

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        return torch.where(weight == 0, near.clamp(-1, 1), weight.sign())

    def coupled(self, mask: Tensor) -> Tensor:
        return mask

    def thresholds(self, v: Tensor) -> Tensor:
        return v.abs()

    def interval(self, lam: Any) -> tuple[Any, Any]:
        return -lam, lam


@dataclass(frozen=True)
class NonNegativeL1(Regularizer):
    """J = λ Σθ on θ ≥ 0, +∞ elsewhere: sparse weights that never turn negative."""

    homogeneous = True

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        inside = (lam * weight).sum()
        return torch.where((weight < 0).any(), torch.full_like(inside, math.inf), inside)

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        return nonnegative_threshold(x, step)

    def subgradient(self, weight: Tensor) -> Tensor:
        return (weight > 0).to(weight.dtype)

    def nearest_subgradient(self, weight: Tensor, near: Tensor) -> Tensor:
        return torch.where(weight > 0, torch.ones_like(weight), near.clamp_max(1))

    def coupled(self, mask: Tensor) -> Tensor:
        return mask

    def thresholds(self, v: Tensor) -> Tensor:
        return v.clamp_min(0)

    def interval(self, lam: Any) -> tuple[Any, Any]:
        return -math.inf, lam


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
        rest = "".join(f", {k}={v!r}" for k, v in vars(self).items() if k not in ("groups", "shards"))
        return f"{type(self).__name__}(groups={groups!r}{rest})"

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

    def on_shards(self, shards: Shards) -> Regularizer:
        if isinstance(self.groups, Tensor):
            return replace(self, shards=shards)
        cutting = shards.cutting(group_dims(self.groups, shards.shape))
        return replace(self, shards=cutting) if cutting.across else self


def broadcasts(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor of shape `small` broadcasts to exactly `large`."""
    try:
        return torch.empty(small, device="meta").expand(large).shape == large
    except RuntimeError:
        return False


@dataclass(frozen=True, eq=False, repr=False)
class GroupL1(Grouped):
    """J = λ Σ_g √n_g ‖θ_g‖₂: whole groups are zero or alive together.

    `groups`: "rows" (output neurons) and "columns" (input features) of a Linear; "kernels" (out, in), "filters" (out)
    and "channels" (in) of a Conv; or a tensor of group numbers that broadcasts against the weight.
    `weighted`: False drops the factor √n_g.
    """

    weighted: bool = True

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
        whole = _bisect(lambda lam: self.norms(self.prox(v, lam)).expand_as(v) > 0, torch.zeros_like(v), high)
        return torch.minimum(v.abs() / self.l1_ratio, whole)


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
