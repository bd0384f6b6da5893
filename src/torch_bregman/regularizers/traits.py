"""What a regulariser says of itself. Other rooms ask for these traits, never for a type.

Every trait has a default that claims nothing. With it the readable path is taken, and all works: training, saving,
resuming, `foreach`, DTensors, and `TargetDensity` where zeros can be counted. What is said makes more possible:

| said | then |
|---|---|
| `unit` | Multilevel trains the live units alone; a DTensor needs no gathering; `shrink` cuts the optimizer along |
| `interval`, `group_norm` | the step is one pass over memory (`fused=True`) |
| `thresholds` in closed form | `TargetDensity` finds λ without a bisection |
| `costly`, `prox_every` | a prox that takes longer than the step itself is called less often |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import Shards
from ..part import Piece

Lam = float | Tensor
OUTPUTS = ("row", "filter")  # units that are the outputs of a layer


class GroupNorm(NamedTuple):
    """prox(x, λ) = S(soft(x, αλ)) with S shrinking the norm of each group by (1−α)·λ, times √(its size) if `weighted`.

    `groups`: the name of the groups; `l1_ratio`: α.
    """

    groups: str
    l1_ratio: float
    weighted: bool


class Traits:
    """What others may ask of a regulariser."""

    #: J₁(c·θ) = c·J₁(θ) for c > 0. Then prox_{δJ}(δv) = δ·prox_J(v): δ scales the weights, never the support.
    homogeneous: bool = False
    #: What is zero or alive together: "entry", "row", "column", "kernel", "filter", "channel", "group" (numbered by an
    #: index), or "rank" (singular values). None: not said.
    unit: str | None = None
    #: Is an entry alive exactly while |v| > λ?
    by_magnitude: bool = False
    #: Does it make zeros, so that a density can be asked of it?
    countable: bool = True
    #: Does its prox add up entries, so that two ways to compute it may round differently?
    sums: bool = False
    #: LinBreg and AdaBreg write θ at every so many steps, for a prox that costs more than the step itself.
    prox_every: int = 1
    #: Is the prox so dear that a checksum of θ is kept, instead of computing it again to see whether θ has changed?
    costly: bool = False
    #: Where the weight is a part of a DTensor: the other parts that the prox of this one needs, if it needs any.
    shards: Shards | None = None

    def coupled(self, mask: Tensor) -> Tensor:
        """The entries whose subgradient depends on an entry in `mask`; one that stands alone touches only itself."""
        return mask if self.unit == "entry" else mask.any().expand_as(mask)

    @property
    def elementwise(self) -> bool:
        """Whether every entry stands alone. Where `unit` does not say so, `coupled` may."""
        if self.unit is not None or type(self).coupled is Traits.coupled:
            return self.unit == "entry"
        probe = torch.tensor([[True, False], [False, False]])
        return bool(torch.equal(self.coupled(probe), probe))

    @property
    def outputs(self) -> bool:
        """Whether its units are the outputs of a layer: without the dead ones it is a smaller dense layer."""
        return self.unit in OUTPUTS

    def spans(self, shape: torch.Size) -> tuple[int, ...] | None:
        """The dimensions that a unit spans in a weight of this shape, () where it is a single entry.

        None: units lie in another way, so that no part of a weight can be trained alone.
        """
        return () if self.elementwise else None

    def restricted(self) -> Any:
        """The same J on the live units, [live] or [live, size of a unit], for a J with `spans`."""
        return self

    def cut(self, part: Piece, dual: Tensor | None, lam: Lam) -> Any:
        """The J of a part of a weight that gives it the prox of the whole; None where there is no such J.

        `dual`: v of the whole weight, which stays as it is where it was cut off; None: zero. `lam`: λ.
        """
        return self if self.elementwise else None

    def interval(self, lam: Any) -> tuple[Any, Any] | None:
        """(low, high) if prox(x, λ) = x − clamp(x, low, high) entry by entry, so that one pass can compute it.

        `lam`: a number, or an array of them. None, the default, for every other J.
        """
        return None

    def group_norm(self) -> GroupNorm | None:
        """The numbers of a prox that shrinks the norms of named groups, so that two passes can compute it."""
        return None

    def check(self, shape: torch.Size) -> None:
        """Raise ValueError if a weight of this shape cannot be regularised."""
