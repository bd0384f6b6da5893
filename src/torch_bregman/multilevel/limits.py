"""What keeps layers from computing with their live weights alone, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from .. import kernels
from ..kernels import DTYPES
from ..optim import BregmanOptimizer
from .hooks import hooked
from .layers import WatchedLayer

NO_NUMBA = "Without Numba no layer computes with its live weights alone: pip install 'torch-bregman[fast]'."


def meant(layers: Iterable[WatchedLayer], optimizer: BregmanOptimizer) -> list[WatchedLayer]:
    """The layers whose regulariser makes zeros that they could leave out one by one, or kernel by kernel."""
    penalised = {
        id(p)
        for group, reg in zip(optimizer.param_groups, optimizer.regularizers, strict=True)
        if reg is not None and (reg.elementwise or reg.unit == "kernel")
        for p in group["params"]
    }
    return [layer for layer in layers if id(layer.weight) in penalised]


def sentences(layers: Sequence[WatchedLayer]) -> list[str]:
    """Why some of these layers compute densely, whatever would be faster."""
    told = []
    for layer in layers:
        if hooked(layer.weight):
            name = f"{layer.name}.weight".removeprefix(".")
            told.append(f"{name} has a gradient hook, which is called with the gradient of the whole weight.")
    elsewhere = {f"{p.dtype} on {p.device}" for p in (layer.weight for layer in layers) if not _at_home(p)}
    if elsewhere:
        told.append(
            f"{', '.join(sorted(elsewhere))}: layers compute with their live weights alone in float32 and float64 on "
            "a CPU; elsewhere groups of rows or filters make a smaller dense network."
        )
    if not kernels.available() and any(_at_home(layer.weight) for layer in layers):
        told.append(NO_NUMBA)
    return told


def _at_home(weight: Tensor) -> bool:
    """Where the kernels compute."""
    return weight.device.type == "cpu" and weight.dtype in DTYPES
