"""Kinds of layers: one file each, which tells all that anybody asks about it.

`of(module)` is how the library asks; `register(MyKind(MyModule))` is how a kind is added (docs/layers.md).
"""

from . import attention, conv, conv1d, embedding, experts, linear, norm, pointwise
from .base import REGISTRY, UNKNOWN, Exchange, Kept, Kind, Options, named, of, register
from .weighted import WeightedSum

__all__ = [
    "REGISTRY",
    "UNKNOWN",
    "Exchange",
    "Kept",
    "Kind",
    "Options",
    "WeightedSum",
    "attention",
    "called",
    "conv",
    "conv1d",
    "embedding",
    "experts",
    "linear",
    "named",
    "norm",
    "of",
    "pointwise",
    "register",
]
