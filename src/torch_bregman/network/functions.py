"""What is known of functions and methods: tables of their rules. Modules have kinds, see `kinds`."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .operations import AVERAGE, MAXIMUM, concatenate, dropout, interpolate, mean, pad, pointwise, pool
from .shapes import flatten, item, permute, read_sizes, squeeze, transpose, unsqueeze, view
from .walk import Rule, unchanged

POINTWISE = [
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu",
    "silu", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign", "hardtanh", "hardtanh_",
    "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "abs", "abs_", "absolute",
    "neg", "neg_", "negative", "exp", "exp_", "expm1", "log", "log1p", "sqrt", "sqrt_", "rsqrt", "reciprocal",
    "square", "sin", "cos", "erf", "add", "add_", "sub", "sub_", "subtract", "mul", "mul_", "multiply", "div", "div_",
    "divide", "true_divide", "pow", "clamp", "clamp_", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "lerp",
    "addcmul", "addcdiv", "clone",
]  # fmt: skip
OPERATORS = ["add", "sub", "mul", "truediv", "pow", "neg", "abs", "iadd", "isub", "imul", "itruediv"]


def named(where: Any, rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    return {found: rule for name, rule in rules.items() if (found := getattr(where, name, None)) is not None}


POOLS: dict[str, Rule] = {
    name.format(d): partial(pool, d, AVERAGE if name.startswith("avg") else MAXIMUM)
    for d in (1, 2, 3)
    for name in ("max_pool{}d", "avg_pool{}d", "adaptive_max_pool{}d", "adaptive_avg_pool{}d")
}
SHARED: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    "mean": mean, "amax": mean, "amin": mean,
    "flatten": flatten, "reshape": view, "permute": permute, "transpose": transpose,
    "unsqueeze": unsqueeze, "squeeze": squeeze,
    "detach": unchanged,
}  # fmt: skip
METHODS: dict[str, Rule] = {
    **SHARED, "view": view, "size": read_sizes, "dim": read_sizes,
    "contiguous": unchanged, "float": unchanged, "double": unchanged,
}  # fmt: skip
FUNCTIONS: dict[Any, Rule] = {
    **named(torch, {**SHARED, **POOLS, "cat": concatenate, "concat": concatenate, "concatenate": concatenate}),
    **named(F, {**dict.fromkeys(POINTWISE, pointwise), **POOLS}),
    **named(operator, {**dict.fromkeys(OPERATORS, pointwise), "pos": unchanged}),
    F.dropout: dropout, F.dropout1d: dropout, F.dropout2d: dropout, F.dropout3d: dropout,
    F.interpolate: interpolate, F.pad: pad, getattr: read_sizes, operator.getitem: item,
}  # fmt: skip
#: rules of operations whose results nobody else has
NEW: tuple[Rule, ...] = (pointwise, mean, concatenate)
