"""Dense or sparse, layer by layer: decided by timing both on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..network.trace import leaving_unchanged
from ..part import Part
from ..timing import race
from .forms import SparseForm
from .hooks import silent
from .layers import SeenInput

FASTER = 0.9  # the sparse form must take less than this share of the dense one's time
ABLE = 3.0  # up to this multiple of it, its neighbours may make up for it
CALLS = 3  # that are timed, after one that may compile


@dataclass(frozen=True)
class Choice:
    """How a layer computes in a cycle, and the seconds of a forward and backward pass that decided about it."""

    kind: str
    density: float
    dense: float
    sparse: float

    @property
    def seconds(self) -> float:
        """Of the kind that was chosen."""
        return self.sparse if self.kind == "sparse" else self.dense


def faster(density: float, dense: float, sparse: float) -> Choice:
    """The faster way through a layer, by its seconds."""
    return Choice("sparse" if sparse < FASTER * dense else "dense", density, dense, sparse)


class Timings:
    """Seconds of a training pass through one layer, dense and sparse, by shape and density; each is measured once.

    Densities within a factor of √2 share a figure.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def layer(
        self, module: nn.Module, form: SparseForm, weight: Tensor, where: Part, seen: SeenInput
    ) -> tuple[float, float]:
        """Seconds of a training pass through `module` for such an input, dense and with the entries `where` alone."""
        key = (
            f"{form.name} {tuple(weight.shape)} {weight.dtype} {seen.shape} {seen.needs_grad} "
            f"{torch.get_num_threads()} threads"
        )
        dense = self._time(f"{key} dense", lambda: _dense(module, form, weight, where, seen))
        sparse = self._time(f"{key} {_rounded(where.density)}", lambda: _sparse(module, form, weight, where, seen))
        return dense, sparse

    def passes(
        self, key: str, model: nn.Module, inputs: tuple[Tensor, ...], parameters: list[Tensor], density: float
    ) -> float:
        """Seconds of a training pass through the whole network as it computes now, which changes nothing.

        No number (nan) where it needs the hooks of the user.
        """
        wanted = [p for p in parameters if p.requires_grad]

        def run() -> None:
            with leaving_unchanged(model), torch.enable_grad():
                y = model(*inputs)
                outputs = [t.sum() for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
                torch.autograd.grad(outputs, wanted, allow_unused=True)

        return self._network(f"network {key}", model, inputs, density, run)

    def forward(self, kind: str, model: nn.Module, inputs: tuple[Tensor, ...], share: float = 1.0) -> float:
        """The same of a forward pass through a network that has this share of the parameters."""

        def run() -> None:
            with leaving_unchanged(model):
                model.forward(*inputs)
                if inputs[0].is_cuda:
                    torch.cuda.synchronize()

        return self._network(f"forward {kind}", model, inputs, share, run)

    def _network(
        self, key: str, model: nn.Module, inputs: tuple[Tensor, ...], share: float, run: Callable[[], None]
    ) -> float:
        shapes = [tuple(x.shape) for x in inputs]
        with silent(model) as silenced:
            try:
                return self._time(f"{key} {shapes} {torch.get_num_threads()} threads {_rounded(share)}", lambda: run)
            except Exception:  # without a hook that it needs it may fail in any way
                if not silenced:
                    raise
                return math.nan

    def _time(self, key: str, make: Callable[[], Callable[[], object]]) -> float:
        if key not in self.seconds:
            self.seconds[key] = min(race({key: make()}, 1, calls=CALLS)[key][0])
        return self.seconds[key]


def _rounded(density: float) -> str:
    """As a power of √2."""
    return f"{2 ** (round(2 * math.log2(max(density, 2.0**-30))) / 2):.2%}"


def _inputs(weight: Tensor, seen: SeenInput) -> Tensor:
    x = torch.randn(seen.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    lies = torch.empty_strided(seen.shape, seen.stride, dtype=weight.dtype) if 0 not in seen.stride else x
    return lies.copy_(x).requires_grad_(seen.needs_grad)


def _dense(module: nn.Module, form: SparseForm, full: Tensor, where: Part, seen: SeenInput) -> Callable[[], object]:
    """A training pass with dense arithmetic, as far as the gradient of the live weights, and what follows a step."""
    x, weight = _inputs(full, seen), full.detach().clone().requires_grad_()
    asked = [weight, x] if seen.needs_grad else [weight]

    def run() -> None:
        y = form.dense(module, x, weight)
        values = where.restrict(torch.autograd.grad(y.sum(), asked)[0])
        where.prolong(values, weight.detach())

    return run


def _sparse(module: nn.Module, form: SparseForm, full: Tensor, live: Part, seen: SeenInput) -> Callable[[], object]:
    """The same with the live weights alone."""
    x, weight, where = _inputs(full, seen), full.detach().clone(), form.pattern(full, live.entries)
    values = where.restrict(full).requires_grad_()
    asked = [values, x] if seen.needs_grad else [values]

    def run() -> None:
        y = form.compute(module, x, values, where)
        where.prolong(torch.autograd.grad(y.sum(), asked)[0], weight)

    return run
