"""What is measured: densities with their denominators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .distributed import count_nonzero, whole
from .layers import Uncounted, matrix_entries, weight_layers
from .naming import Names, name_weights
from .network.reparametrised import warn_reparametrised
from .regularizers import NuclearNorm
from .text import Shown, Table


def check_density(density: float, *, name: str = "density", one_allowed: bool = False) -> None:
    """ValueError unless `density` is a number in (0, 1), or (0, 1] where one is allowed."""
    bounds = "(0, 1]" if one_allowed else "(0, 1)"
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise ValueError(f"Invalid `{name}`: {density!r}; expected a number in {bounds}.")
    if not (0 < density < 1 or (one_allowed and density == 1)):
        hint = f"; for {density:g} % write {density / 100:g}" if 1 < density <= 100 else ""
        raise ValueError(f"Invalid `{name}`: {density!r}; expected a number in {bounds}{hint}.")


@torch.no_grad()
def density(model: nn.Module, *, weights: Names | None = None) -> float:
    """Non-zero entries of all weights over their number; biases, norms and embeddings are not counted.

    Weights are those that `tb.param_groups` regularises, and what is named in `weights`, as there. What else the model
    has, `print(tb.sparsity_report(model))` says. Raises ValueError if the model has no weight.
    """
    name_weights(model, weights)
    warn_reparametrised(model)
    counted = [layer.weight for layer in weight_layers(model)]
    size = sum(w.numel() for w in counted)
    if size == 0:
        raise ValueError(f"`model` has no Linear or Conv weights, so its density is not defined{_hint(model)}.")
    return sum(count_nonzero(counted)) / size


def _hint(model: nn.Module) -> str:
    """What could be named where nothing is counted."""
    _, _, outside = matrix_entries(model)
    return f"; name some, as in weights=[{outside[0].name!r}]" if outside else ""


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


@dataclass(frozen=True, repr=False)
class SparsityReport(Shown):
    """Per layer and in total what is alive, each with its denominator. Prints as a table."""

    layers: tuple[LayerSparsity, ...]
    outside: tuple[Uncounted, ...] = ()

    @property
    def counted(self) -> tuple[int, int]:
        """Entries that are counted, and those of all matrices: parameters with two dimensions or more."""
        size = self.weights[1]
        return size, size + sum(one.entries for one in self.outside)

    def _total(self, pairs: list[tuple[int, int] | None]) -> tuple[int, int]:
        there = [pair for pair in pairs if pair is not None]
        return sum(alive for alive, _ in there), sum(size for _, size in there)

    @property
    def weights(self) -> tuple[int, int]:
        """(non-zero, all) weights."""
        return self._total([layer.weights for layer in self.layers])

    @property
    def density(self) -> float:
        """Non-zero over all weights."""
        kept, size = self.weights
        return kept / max(size, 1)

    @property
    def neurons(self) -> tuple[int, int]:
        """(alive, all) outputs of the Linear weights, and of others without a kernel."""
        return self._total([layer.outputs for layer in self.layers if layer.kernels is None])

    @property
    def filters(self) -> tuple[int, int]:
        """(alive, all) output filters of the Conv weights."""
        return self._total([layer.outputs for layer in self.layers if layer.kernels is not None])

    @property
    def kernels(self) -> tuple[int, int]:
        """(alive, all) (out, in) kernels of the Conv weights."""
        return self._total([layer.kernels for layer in self.layers])

    def shown(self) -> list[Table | str]:
        head = ["layer", "shape", "weights", "density", "outputs", "inputs", "kernels", "rank"]
        rows = [head, *([_cell(value) for value in self._row(layer)] for layer in self.layers)]
        kept, size = self.weights
        rows.append(["all", "", f"{kept:,}/{size:,}", f"{self.density:.3%}", "", "", _cell(self.kernels), ""])
        keep = [i for i in range(len(head)) if any(row[i] for row in rows[1:])]
        shown = Table([[row[i] for i in keep] for row in rows], left=range(2))
        hint = "; name in `weights` what shall count" if self.outside else ""
        return [shown, f"alive/all; weights: non-zero entries, biases and norms not counted; {self.coverage}{hint}"]

    def to_dict(self) -> dict[str, float | str]:
        (kept, size), (counted, every) = self.weights, self.counted
        made: dict[str, float | str] = {
            "density": self.density, "kept": kept, "size": size, "counted": counted / max(every, 1),
        }  # fmt: skip
        for layer in self.layers:
            made[f"density/{layer.name}"], made[f"outputs/{layer.name}"] = layer.density, layer.outputs[0]
            if layer.rank is not None:
                made[f"rank/{layer.name}"] = layer.rank[0]
        return made

    @property
    def coverage(self) -> str:
        """How many matrix entries the density counts, and the largest parameters that it does not."""
        counted, every = self.counted
        text = f"{counted:,} of {every:,} matrix entries are counted"
        if not self.outside:
            return text
        shown = [f"{one.name} ({one.why}; {one.entries:,})" for one in self.outside[:4]]
        more = f", and {len(self.outside) - 4} more" if len(self.outside) > 4 else ""
        return f"{text}, without {', '.join(shown)}{more}"

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
def sparsity_report(model: nn.Module, *, rank: bool = False, weights: Names | None = None) -> SparsityReport:
    """What is alive per layer: weights, outputs (neurons, filters), inputs, kernels, and with `rank` the rank.

    Exact zeros are counted on the device and fetched once; `rank` costs a singular value decomposition per layer.
    `weights` names further weights, as in `tb.param_groups`.
    """
    name_weights(model, weights)
    warn_reparametrised(model)
    layers = list(weight_layers(model))
    if not layers:
        raise ValueError(f"`model` has no Linear or Conv weights, so there is nothing to report{_hint(model)}.")
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
                kernels=(alive, kernel.numel()) if weight.dim() > 2 and not layers[i].stacked else None,
                rank=(NuclearNorm().rank(whole(weight, Tensor.float)), min(weight.flatten(1).shape)) if rank else None,
            )
        )
    return SparsityReport(tuple(found), tuple(matrix_entries(model)[2]))
