"""What is measured: densities with their denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import count_nonzero, whole
from .layers import weight_layers
from .regularizers import NuclearNorm
from .text import table


def check_density(density: float, *, name: str = "density", one_allowed: bool = False) -> None:
    """ValueError unless `density` is a number in (0, 1), or (0, 1] where one is allowed."""
    bounds = "(0, 1]" if one_allowed else "(0, 1)"
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise ValueError(f"Invalid `{name}`: {density!r}; expected a number in {bounds}.")
    if not (0 < density < 1 or (one_allowed and density == 1)):
        hint = f"; for {density:g} % write {density / 100:g}" if 1 < density <= 100 else ""
        raise ValueError(f"Invalid `{name}`: {density!r}; expected a number in {bounds}{hint}.")


@torch.no_grad()
def density(model: nn.Module) -> float:
    """Non-zero entries of all Linear and Conv weights over their number; biases and norms are not counted.

    Raises ValueError if the model has no such weight.
    """
    weights = [layer.weight for layer in weight_layers(model)]
    size = sum(w.numel() for w in weights)
    if size == 0:
        raise ValueError("`model` has no Linear or Conv weights, so its density is not defined.")
    return sum(count_nonzero(weights)) / size


@dataclass(frozen=True)
class LayerSparsity:
    """One layer: pairs are (alive, all). `outputs` are neurons or filters, `inputs` input features or channels."""

    name: str
    shape: tuple[int, ...]
    weights: tuple[int, int]
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    kernels: tuple[int, int] | None
    rank: tuple[int, int] | None

    @property
    def density(self) -> float:
        """Non-zero weights over all weights of this layer."""
        return self.weights[0] / max(self.weights[1], 1)


@dataclass(frozen=True)
class SparsityReport:
    """Per layer and in total what is alive, each with its denominator. Prints as a table."""

    layers: tuple[LayerSparsity, ...]

    def _total(self, pairs: list[tuple[int, int] | None]) -> tuple[int, int]:
        there = [pair for pair in pairs if pair is not None]
        return sum(alive for alive, _ in there), sum(size for _, size in there)

    @property
    def weights(self) -> tuple[int, int]:
        """(non-zero, all) Linear and Conv weights."""
        return self._total([layer.weights for layer in self.layers])

    @property
    def density(self) -> float:
        """Non-zero over all Linear and Conv weights."""
        kept, size = self.weights
        return kept / max(size, 1)

    @property
    def neurons(self) -> tuple[int, int]:
        """(alive, all) rows of the Linear weights."""
        return self._total([layer.outputs for layer in self.layers if len(layer.shape) == 2])

    @property
    def filters(self) -> tuple[int, int]:
        """(alive, all) output filters of the Conv weights."""
        return self._total([layer.outputs for layer in self.layers if len(layer.shape) > 2])

    @property
    def kernels(self) -> tuple[int, int]:
        """(alive, all) (out, in) kernels of the Conv weights."""
        return self._total([layer.kernels for layer in self.layers])

    def __str__(self) -> str:
        head = ["layer", "shape", "weights", "density", "outputs", "inputs", "kernels", "rank"]
        rows = [head, *([_cell(value) for value in self._row(layer)] for layer in self.layers)]
        kept, size = self.weights
        rows.append(["all", "", f"{kept:,}/{size:,}", f"{self.density:.3%}", "", "", _cell(self.kernels), ""])
        keep = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
        shown = table([[row[i] for i in keep] for row in rows], left=range(2))
        return f"{shown}\nalive/all; weights: non-zero entries of Linear and Conv weights, biases and norms not counted"

    @staticmethod
    def _row(layer: LayerSparsity) -> list[object]:
        shape = "×".join(map(str, layer.shape))
        return [layer.name, shape, layer.weights, f"{layer.density:.3%}", layer.outputs, layer.inputs, layer.kernels,
                layer.rank]  # fmt: skip


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:,}/{value[1]:,}" if value[1] else ""
    return "" if value is None else str(value)


@torch.no_grad()
def sparsity_report(model: nn.Module, *, rank: bool = False) -> SparsityReport:
    """What is alive per layer: weights, outputs (neurons, filters), inputs, kernels, and with `rank` the rank.

    Exact zeros are counted on the device and fetched once; `rank` costs a singular value decomposition per layer.
    """
    layers = list(weight_layers(model))
    if not layers:
        raise ValueError("`model` has no Linear or Conv weights, so there is nothing to report.")
    counts, kernels = [], []
    for layer in layers:
        alive = whole(layer.weight, lambda part: part != 0)
        kernel = layer.grouped(alive).any(3)  # [groups, outputs / groups, inputs / groups]
        kernels.append(kernel)
        counts += [torch.count_nonzero(t) for t in (alive, kernel.any(2), kernel.any(1), kernel)]
    flat = torch.stack([count.to(counts[0].device) for count in counts]).tolist()
    found = []
    for i, ((name, _, weight), kernel) in enumerate(zip(layers, kernels, strict=True)):
        entries, outputs, inputs, alive = flat[4 * i : 4 * i + 4]
        groups, out, into = kernel.shape
        found.append(
            LayerSparsity(
                name=name,
                shape=tuple(weight.shape),
                weights=(entries, weight.numel()),
                outputs=(outputs, groups * out),
                inputs=(inputs, groups * into),
                kernels=(alive, kernel.numel()) if weight.dim() > 2 else None,
                rank=(NuclearNorm().rank(whole(weight, Tensor.float)), min(weight.flatten(1).shape)) if rank else None,
            )
        )
    return SparsityReport(tuple(found))
