"""W = U V with fewer numbers than W has, where the rank allows it: two layers instead of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..network import kinds
from .copy import ShrinkingCopy

SINGULAR = 1e-6  # of the largest singular value: what is smaller is zero


@torch.no_grad()
def split_ranks(smaller: ShrinkingCopy) -> None:
    """Put two layers in the place of each whose rank is low enough."""
    shared = [id(p) for m in smaller.model.modules() for p in m._parameters.values() if p is not None]
    for name, outcome in smaller.outcomes.items():
        module: Any = smaller.model.get_submodule(name)
        kind = kinds.of(module)
        if not kind.mixes(module) or module._forward_hooks or module._forward_pre_hooks:
            continue
        if shared.count(id(module.weight)) > 1 or _is_read(smaller.model, name):
            continue
        weight = kind.matrix(module).flatten(1)
        rank = _rank(weight)
        if not rank or rank * sum(weight.shape) >= int(weight.count_nonzero()):
            continue
        factors = kind.factors(module, rank)
        if factors is not None:
            smaller.replace(name, _factored(module, weight, *factors))
            outcome.rank = rank


def _is_read(model: nn.Module, name: str) -> bool:
    """Whether the module around it takes the weights themselves."""
    parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
    return kinds.of(parent).reads_parts


def _rank(weight: Tensor) -> int | None:
    """How many singular values count; None where there is nothing to gain or nothing finite."""
    if min(weight.shape) < 2 or not bool(weight.isfinite().all()) or not bool(weight.any()):
        return None
    values = torch.linalg.svdvals(weight.double())
    return int((values > SINGULAR * values[0]).sum())


def _factored(module: Any, weight: Tensor, first: Any, second: Any) -> nn.Sequential:
    """Two layers, V and then U with the bias, where UV is the weight of a layer."""
    rank = len(first.weight)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    first.weight.copy_((root[:, None] * v[:rank]).view_as(first.weight))
    second.weight.copy_((u[:, :rank] * root).view_as(second.weight))
    for p in (first.weight, second.weight):
        p.requires_grad_(module.weight.requires_grad)
    if module.bias is not None:
        second.bias = module.bias
    return nn.Sequential(first, second)
