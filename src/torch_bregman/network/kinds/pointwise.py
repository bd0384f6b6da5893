"""Modules that work channel by channel, or move channels: activations, dropout, pooling, flattening."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..functions import POOLS
from ..heads import HeadsRule, keep, softmax
from ..operations import dropout, interpolate, pointwise
from ..shapes import flatten
from ..walk import Rule, Walk, Wire, barrier, channelwise, numbers, unchanged
from .base import Kind, register

ACTIVATIONS = [
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus",
    "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "Softshrink", "Hardshrink",
    "Threshold",
]  # fmt: skip


class Ruled(Kind):
    """A module that does what a function does, for which there is a rule."""

    in_training = True

    def __init__(self, module_class: type[nn.Module], rule: Rule) -> None:
        super().__init__(module_class)
        self.rule = rule

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        return self.rule(walk, node, module)


class Activation(Ruled):
    makes_new = True


class Identity(Ruled):
    follow_heads: HeadsRule = staticmethod(keep)
    arguments = ()


class Noise(Kind):
    """What draws random numbers in training."""

    noise = True


class Dropout(Ruled, Noise):
    pass


class PlainDropout(Dropout):
    """Of single entries: heads stay heads."""

    follow_heads: HeadsRule = staticmethod(keep)


class Softmax(Kind):
    follow_heads: HeadsRule = staticmethod(softmax)


@channelwise
def _prelu(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    if module.num_parameters > 1:
        return barrier(walk, node, module)
    value = torch.where(wire.value > 0, wire.value, numbers(module.weight) * wire.value)
    return walk.emit(wire.dim, wire.ids, wire.constant, value)


class PReLU(Ruled):
    in_training = False  # its slope changes


for _name in ACTIVATIONS:
    register(Activation(getattr(nn, _name), pointwise))
for _name, _rule in POOLS.items():  # MaxPool2d is max_pool2d, and so on
    register(Ruled(getattr(nn, "".join(map(str.capitalize, _name.split("_")))), _rule))
register(PlainDropout(nn.Dropout, dropout))
for _class in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
    register(Dropout(_class, dropout))
register(Noise(_DropoutNd))  # of classes that are derived from it
register(Identity(nn.Identity, unchanged))
register(Ruled(nn.Flatten, flatten))
register(Ruled(nn.Upsample, interpolate))
register(PReLU(nn.PReLU, _prelu))
register(Softmax(nn.Softmax))
