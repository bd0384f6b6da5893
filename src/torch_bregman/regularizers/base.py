"""What J is. A regulariser is J = λ·J₁ with λ held by the optimizer; here is J₁, as a few small methods.

Your own is a subclass of `Regularizer` with `value`, `prox` and `subgradient`; everything else has a default that works
for it (see CONTRIBUTING.md). What it may say of itself beyond that stands in `traits.py`.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from ..distributed import Shards
from .traits import Lam, Traits

#: what is said of a method, and holds for that one only
_SAID_OF = {
    "prox": ("interval", "group_norm", "thresholds", "nearest_subgradient", "by_magnitude"),
    "thresholds": ("by_magnitude",),
}


class Regularizer(Traits):
    """A convex J = λ·J₁ on one weight tensor. All results are shaped like the weight, except `value` (a scalar)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class with a prox of its own claims nothing that was said of another one."""
        super().__init_subclass__(**kwargs)
        for changed, names in _SAID_OF.items():
            for name in names if changed in vars(cls) else ():
                if name not in vars(cls):
                    setattr(cls, name, getattr(Regularizer, name))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Notes the arguments, for `repr`. A copy gets them with the rest of its attributes."""
        self = super().__new__(cls)
        self.__dict__["_arguments"] = (args, kwargs)
        return self

    def __repr__(self) -> str:
        """Class name and arguments: by this text `load_state_dict` knows whether a run goes on with the same J."""
        args, kwargs = self.__dict__.get("_arguments", ((), {}))
        if type(self).__init__ is object.__init__:  # it takes none
            return f"{type(self).__name__}()"
        given = inspect.signature(self.__init__).bind(*args, **kwargs)  # type: ignore[misc]
        given.apply_defaults()
        shown = [f"{name}={_argument(value)}" for name, value in given.arguments.items()]
        return f"{type(self).__name__}({', '.join(shown)})"

    # ---- what you write

    def value(self, weight: Tensor, lam: Lam = 1.0) -> Tensor:
        """J(θ) = λ·J₁(θ)."""
        raise NotImplementedError

    def prox(self, x: Tensor, step: Lam) -> Tensor:
        """argmin_z  step·J₁(z) + ‖z − x‖²/2, where an optimizer passes step = δ·λ. Zeros come out exactly zero."""
        raise NotImplementedError

    def subgradient(self, weight: Tensor) -> Tensor:
        """An element of ∂J₁(θ), zero wherever zero is allowed: the p of a start that remembers nothing."""
        raise NotImplementedError

    # ---- what follows from it

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

    def thresholds(self, v: Tensor) -> Tensor:
        """For every entry the smallest λ at which prox(v, λ) is zero there: θ ≠ 0 while λ is below, to rounding.

        The default bisects entry by entry, for a J whose entries stand alone and a prox that takes a tensor for λ.
        """
        high = torch.full_like(v, max(float(v.abs().max()), 1e-30)) if v.numel() else v.clone()
        for _ in range(40):
            alive = self.prox(v, float(high.max()) if high.numel() else 1.0) != 0
            if not bool(alive.any()):
                break
            high = high * 2
        return bisect(lambda lam: self.prox(v, lam) != 0, torch.zeros_like(v), high)

    @property
    def closed_form(self) -> bool:
        """Whether `thresholds` is a formula. Otherwise whoever looks for a λ tries one after the other."""
        return type(self).thresholds is not Regularizer.thresholds

    def lambda_max(self, v: Tensor) -> Tensor:
        """The smallest λ at which prox(v, λ) is zero everywhere (the dual norm of `v` for a norm), a scalar tensor."""
        if self.closed_form:
            return self.thresholds(v).max() if v.numel() else v.sum()
        return v.new_tensor(turning_point(lambda lam: bool(self.prox(v, lam).any()))[1])

    def alive(self, weight: Tensor) -> Tensor:
        """The share of `weight` that is alive, a scalar tensor: non-zero over all entries."""
        return torch.count_nonzero(weight) / max(weight.numel(), 1)

    def on_shards(self, shards: Shards) -> Regularizer:
        """J on one rank's part of a DTensor: itself where entries stand alone, else it gathers the weight every time.

        They stand alone where `unit` says so or a class defines `coupled`; one whose `coupled` links entries defines
        this method as well.
        """
        alone = self.unit == "entry" or type(self).coupled is not Traits.coupled
        return self if alone else Gathered(self, shards)


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

    @property
    def closed_form(self) -> bool:
        return self.J.closed_form

    def alive(self, weight: Tensor) -> Tensor:
        return self.J.alive(self.shards.whole(weight))


def check_regularizer(regularizer: Any) -> None:
    """ValueError unless it is None or has the methods of a regulariser."""
    if isinstance(regularizer, type):
        raise ValueError(f"Invalid `regularizer`: the class {regularizer.__name__}; expected an object, add ().")
    if regularizer is not None and not isinstance(regularizer, Regularizer):
        raise ValueError(f"Invalid `regularizer`: {regularizer!r}; expected a tb.Regularizer such as tb.L1(), or None.")


def bisect(alive: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Per entry, the λ in [low, high] where `alive(λ)` turns false, to the last float."""
    for _ in range(60):
        middle = (low + high) / 2
        up = alive(middle)
        low, high = torch.where(up, middle, low), torch.where(up, high, middle)
    return high


def turning_point(holds: Callable[[float], bool], start: float = 1.0) -> tuple[float, float]:
    """Two neighbouring numbers, or nearly so: for the smaller one `holds` is true, for the larger one false.

    `holds` is true up to some positive number and false from there on. (0, 0) where it is never true.
    """
    low, high = 0.0, start
    while high < 1e300 and holds(high):
        low, high = high, 2 * high
    while low == 0.0 and high > 1e-300 and not holds(high / 2):
        high /= 2
    if high <= 1e-300:
        return 0.0, 0.0
    low = low or high / 2
    while (middle := (low + high) / 2) not in (low, high) and high - low > 1e-15 * high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def broadcasts(small: torch.Size, large: torch.Size) -> bool:
    """Whether a tensor of shape `small` broadcasts to exactly `large`."""
    try:
        return torch.empty(small, device="meta").expand(large).shape == large
    except RuntimeError:
        return False


def fingerprint(index: Tensor) -> str:
    """Shape and checksum of a tensor, so that two of one shape are told apart."""
    values = index.detach().cpu().contiguous()
    return f"{tuple(index.shape)} {zlib.crc32(values.view(torch.uint8).numpy().tobytes()):08x}"


def _argument(value: Any) -> str:
    """`repr`, but the same in every process: without addresses, and with what a tensor holds."""
    if isinstance(value, Tensor):
        return f"<tensor {fingerprint(value)}>"
    return getattr(value, "__qualname__", None) or repr(value)
