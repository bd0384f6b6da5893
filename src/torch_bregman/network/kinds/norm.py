"""Norms: of a batch, of groups of channels, of layers and of single samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase

from ..walk import Call, Walk, Wire, barrier, numbers, only_input
from .base import Exchange, Kept, Kind, Options, register

BATCH: Options = {"affine": True, "track_running_stats": True, "bias": True}


class RunningNorm(Kind):
    """A norm that may keep running statistics."""

    statistics = True


class BatchNorm(RunningNorm):
    in_training = True
    makes_new = True
    arguments = ("num_features",)
    options = BATCH

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        """A constant channel becomes its shift, or what the running statistics make of it."""
        wire = only_input(walk, node)
        if wire is None or wire.dim != 1:
            return barrier(walk, node, module)
        n = len(wire.ids)
        weight = torch.ones(n).double() if module.weight is None else numbers(module.weight)
        bias = torch.zeros(n).double() if module.bias is None else numbers(module.bias)
        value = bias
        if not module.training and module.running_mean is not None:
            mean, variance = numbers(module.running_mean), numbers(module.running_var)
            value = weight * (wire.value - mean) / (variance + module.eps).sqrt() + bias
        output = walk.emit(1, wire.ids, wire.constant, value)
        walk.calls.append(Call(str(node.target), module, wire, output, torch.ones(n, dtype=torch.bool), ()))
        return output

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            exchange(name, kept.outputs)
        if kept.outputs is not None:
            module.num_features = len(kept.outputs)


class GroupNorm(Kind):
    arguments = ("num_groups", "num_channels")
    options: Options = {"affine": True, "bias": True}

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        """A group that is constant as a whole becomes constants; it goes as a whole, or stays."""
        wire = only_input(walk, node)
        if wire is None or wire.dim != 1:
            return barrier(walk, node, module)
        ids, known, value = (t.view(module.num_groups, -1) for t in wire[1:])
        walk.pairs += [(ids[:, 0], other) for other in ids.T[1:]]
        mean, variance = value.mean(1, keepdim=True), value.var(1, unbiased=False, keepdim=True)
        value = ((value - mean) / (variance + module.eps).sqrt()).view(-1)
        if module.weight is not None:
            value = value * numbers(module.weight) + numbers(module.bias)
        output = walk.emit(1, wire.ids, known.all(1, keepdim=True).expand_as(known).reshape(-1), value)
        alive = torch.ones(len(value), dtype=torch.bool)
        walk.calls.append(Call(str(node.target), module, wire, output, alive, ()))
        return output

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        if kept.outputs is None:
            return
        for name in ("weight", "bias"):
            exchange(name, kept.outputs)
        module.num_groups = module.num_groups * len(kept.outputs) // module.num_channels
        module.num_channels = len(kept.outputs)


class LayerNorm(Kind):
    """Needs all its channels, so a walk ends here."""

    arguments = ("normalized_shape",)
    options: Options = {"elementwise_affine": True, "bias": True}


class InstanceNorm(RunningNorm):
    arguments = ("num_features",)
    options: Options = {**BATCH, "affine": False, "track_running_stats": False}


register(RunningNorm(_NormBase))  # of classes that are derived from it
register(GroupNorm(nn.GroupNorm))
register(LayerNorm(nn.LayerNorm))
for _batch, _instance in (
    (nn.BatchNorm1d, nn.InstanceNorm1d),
    (nn.BatchNorm2d, nn.InstanceNorm2d),
    (nn.BatchNorm3d, nn.InstanceNorm3d),
):
    register(BatchNorm(_batch))
    register(InstanceNorm(_instance))
