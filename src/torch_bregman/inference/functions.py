"""Functions such as F.relu in a traced network as the modules that are the same, which are easier to recognise."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

# An operation as the module that is the same: (its options in order, the module made of them).
_OPTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., nn.Module]]] = {}
for _names, _options, _make in (
    ((torch.relu, F.relu, "relu"), ("inplace",), nn.ReLU),
    ((torch.sigmoid, F.sigmoid, "sigmoid"), (), nn.Sigmoid),
    ((torch.tanh, F.tanh, "tanh"), (), nn.Tanh),
    ((F.silu,), ("inplace",), nn.SiLU),
    ((F.gelu,), ("approximate",), nn.GELU),
    ((F.relu6,), ("inplace",), nn.ReLU6),
    ((F.leaky_relu,), ("negative_slope", "inplace"), nn.LeakyReLU),
    (
        (torch.flatten, "flatten"),
        ("start_dim", "end_dim"),
        lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    ),
    (
        (F.max_pool2d, torch.max_pool2d),
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        lambda kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: nn.MaxPool2d(
            kernel_size, stride, padding, dilation, return_indices, ceil_mode
        ),
    ),
):
    for _name in _names:
        _OPTIONS[_name] = _options, _make


def as_module(root: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    """Turn a call of a function into one of its module, if there is one."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    if node.target in ("view", "reshape"):
        if not _flattens(node, values):
            return
        module: nn.Module = nn.Flatten()
    elif node.target is F.dropout and not node.kwargs.get("training", True):
        module = nn.Identity()
    elif node.target in _OPTIONS:
        options, make = _OPTIONS[node.target]
        given = {**dict(zip(options, node.args[1:], strict=False)), **node.kwargs}
        if (
            not all(isinstance(value, int | float | str | tuple | None) for value in given.values())
            or len(node.args) > len(options) + 1
        ):
            return
        given = {name: value for name, value in given.items() if name in options}
        module = make(**given)
    else:
        return
    name = f"as_module_{node.name}"
    root.add_submodule(name, module.eval())
    with root.graph.inserting_before(node):
        call = root.graph.call_module(name, (source,))
    values[call.name] = values[node.name]
    node.replace_all_uses_with(call)
    root.graph.erase_node(node)


def _flattens(node: fx.Node, values: dict[str, Any]) -> bool:
    """Whether it is x.view(len(x), -1) or x.view(-1, n): the batch stays, whatever its size."""
    x, y = values[node.all_input_nodes[0].name], values[node.name]
    if not isinstance(x, Tensor) or y.dim() != 2 or len(y) != len(x) or len(node.args) != 3:
        return False
    first = node.args[1]
    if not isinstance(first, fx.Node):
        return bool(first == -1)
    if first.op == "call_method" and first.target == "size":
        return first.args[1:] == (0,)
    if first.target is operator.getitem and first.args[1] == 0 and isinstance(first.args[0], fx.Node):
        shape = first.args[0]
        return shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape")
    return False
