"""Which tensors of a traced network lie in the same memory, and which operations write to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import fx, nn

IN_PLACE = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")}
#: what these modules define writes to its inputs only where its name or its arguments say so
TORCH = ("torch", "_operator", "operator", "builtins", "math")


def name_of(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def writes(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an operation returns its first argument, to which it wrote its result."""
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if getattr(node.target, "__module__", None) == "_operator":  # and_, not_
        return name in IN_PLACE
    return (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE or _inplace(node)


def may_write(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether any of its inputs may be another one afterwards: `out=`, hooks, and functions that are not torch's."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return bool(module._forward_hooks or module._forward_pre_hooks)
    if node.op != "call_function":
        return "out" in node.kwargs
    origin = getattr(node.target, "__module__", None) or "torch"
    return "out" in node.kwargs or origin.partition(".")[0] not in TORCH


def sharing(
    nodes: Iterable[fx.Node], order: Mapping[fx.Node, int], before: int, shares: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    """All tensors made earlier that may lie in the memory of `nodes`; `shares`: of a node, in that of its inputs."""
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        waiting += [user for user in node.users if order[user] < before and shares(user)]
        if shares(node):
            waiting += node.all_input_nodes
    return found


def _inplace(node: fx.Node) -> bool:
    """The argument `inplace` of a function, by name or by place."""
    given: Any = node.kwargs.get("inplace", False)
    if any(arg is True for arg in node.args) and node.op == "call_function":
        try:
            names = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        except ValueError:  # one that is written in C has no such argument
            return bool(given)
        if "inplace" in names[: len(node.args)]:
            given = node.args[names.index("inplace")]
    return bool(given)
