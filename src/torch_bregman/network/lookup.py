"""What is known of an operation: a rule by name for functions and methods, the kind of a module."""

from __future__ import annotations

from torch import fx

from . import kinds
from .functions import FUNCTIONS, METHODS
from .operations import pointwise
from .shapes import read_sizes
from .walk import Operation, Rule, Walk, barrier, nothing


def operation(walk: Walk, node: fx.Node) -> Operation:
    """The rule of a node, and its module where it has one that may be followed."""
    if node.op in ("placeholder", "get_attr"):
        return Operation(nothing)
    if node.op == "call_module" and node.target not in walk.fixed:
        module = walk.modules[str(node.target)]
        kind = kinds.of(module)
        known = node in walk.shapes and (kind.in_training or not walk.weights_change)
        return Operation(kind.follow, module, kind.makes_new) if known else Operation(barrier, module)
    rule: Rule = barrier
    if node.op == "call_method":
        rule = METHODS.get(str(node.target), barrier)
    elif node.op == "call_function":
        rule = FUNCTIONS.get(node.target, barrier)
    known = node in walk.shapes or rule in (read_sizes, nothing)
    return Operation(rule, None, rule is pointwise) if known else Operation(barrier)
