"""Layers whose outputs are weighted sums of their inputs: y = W x + b, at every position alike."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..walk import Call, Walk, Wire, barrier, numbers
from .base import Exchange, Kept, Kind


class WeightedSum(Kind):
    """A layer with one weight, whose outputs or inputs can be cut off.

    As it stands it is a Linear without its arithmetic: channels in the last dimension, one weight [outputs, inputs].

    Attributes:
        rows_are_outputs: whether the weight lies as [outputs, inputs, …]; else as [inputs, outputs, …].
        counts: the attributes of the module that say how many outputs and inputs it has, in this order.
    """

    makes_new = True
    reported = True
    rows_are_outputs = True
    counts = ("out_features", "in_features")

    # ---- what it has

    def weights(self, module: Any) -> tuple[str, ...]:
        return ("weight",) if module._parameters.get("weight") is not None else ()

    def groups(self, module: Any) -> int:
        """In how many groups of channels it works, each by itself."""
        return 1

    def grouped(self, module: Any, name: str, tensor: Tensor) -> Tensor:
        groups = self.groups(module)
        parts = tensor.reshape(groups, len(tensor) // groups, *tensor.shape[1:])
        if not self.rows_are_outputs:
            parts = parts.transpose(1, 2)
        return parts.reshape(*parts.shape[:3], math.prod(parts.shape[3:]))

    def effective(self, module: Any) -> Tensor:
        """The weight that it computes with, lying as it does in the module."""
        return module.weight.detach()

    def matrix(self, module: Any) -> Tensor:
        weight = self.effective(module)
        return weight if self.rows_are_outputs else weight.transpose(0, 1)

    def sizes(self, module: Any) -> tuple[int, int]:
        outputs, inputs = (getattr(module, name) for name in self.counts)
        return outputs, inputs

    # ---- what it computes

    def positions(self, module: Any, x: torch.Size) -> int:
        return math.prod(x[:-1])

    def flops(self, module: Any, x: torch.Size, *, zeros: bool = True) -> int:
        weight = self.effective(module)
        return 2 * (weight.numel() if zeros else int(weight.count_nonzero())) * self.positions(module, x)

    # ---- how a walk follows it

    def channels(self, module: Any, shape: tuple[int, ...]) -> int | None:
        """The dimension of an input in which its channels lie; None for an input that it is not made for."""
        return len(shape) - 1

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        """A unit that does not live emits its bias, and so does one that reads constants only."""
        if len(node.args) != 1 or node.kwargs:
            return barrier(walk, node, module)
        (source,) = node.all_input_nodes
        name, shape, groups = str(node.target), walk.shapes[source], self.groups(module)
        dim = self.channels(module, shape)
        if dim is None:
            return barrier(walk, node, module)
        wire = walk.at(source, dim)
        n = len(self.matrix(module))
        alive = walk.alive[name].cpu() if name in walk.alive else torch.ones(n, dtype=torch.bool)
        given = self.bias(module, "weight")
        value = torch.zeros(n).double() if given is None else numbers(given)
        constant = ~alive
        if groups > 1 or not walk.weights_change:
            constant, value = self.constants(module, wire, alive, value, change=walk.weights_change)
        if groups == 1:
            ids = walk.new(n)
        else:  # a group goes with all its inputs and outputs, or stays
            own = wire.ids.view(groups, -1)
            walk.pairs += [(own[:, 0], other) for other in own.T[1:]]
            ids = own[:, :1].expand(groups, n // groups).reshape(-1)
        output = walk.emit(dim, ids, constant, value)
        walk.calls.append(Call(name, module, wire, output, alive, shape[dim + 1 :]))
        return output

    def constants(self, module: Any, wire: Wire, alive: Tensor, bias: Tensor, *, change: bool) -> tuple[Tensor, Tensor]:
        """Which units are constant, and what they emit.

        `alive`: those that have a weight; `bias`: what they emit without inputs; `change`: weights that are zero may
        come alive.
        """
        weight, groups = numbers(self.matrix(module)), self.groups(module)
        weight = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])  # [groups, out, in, *kernel]
        sums = weight[..., None].flatten(3).sum(3)
        reads = torch.ones_like(sums, dtype=torch.bool) if change else (weight != 0)[..., None].flatten(3).any(3)
        known, value = wire.constant.view(groups, 1, -1), wire.value.view(groups, 1, -1)
        if self.padded(module):  # at the border it is another one
            known = known & (value == 0)
        constant = ~(reads & ~known).any(2).view(-1)
        total = bias + torch.where(known, sums * value, 0.0).sum(2).view(-1)
        return constant | ~alive, torch.where(alive, total, bias)

    def mixes(self, module: Any) -> bool:
        return self.groups(module) == 1

    # ---- how it is cut

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        index, weight = (kept.outputs, kept.inputs), kept.weight
        if not self.rows_are_outputs:
            index, weight = index[::-1], None if weight is None else weight.transpose(0, 1)
        exchange("weight", *index, value=weight)
        self.cut_bias(module, kept, exchange)
        rows, columns = module.weight.shape[:2]
        for name, size in zip(self.counts, (rows, columns) if self.rows_are_outputs else (columns, rows), strict=True):
            setattr(module, name, size)

    def cut_bias(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        """Of a layer without a bias, one is made for what removed inputs contribute."""
        if module.bias is None:
            if kept.shift is not None:
                module.bias = nn.Parameter(kept.shift.to(module.weight), requires_grad=module.weight.requires_grad)
            return
        value = None
        if kept.shift is not None:
            value = numbers(module.bias) if kept.outputs is None else numbers(module.bias)[kept.outputs]
            value = value + kept.shift
        exchange("bias", kept.outputs, value=value)
