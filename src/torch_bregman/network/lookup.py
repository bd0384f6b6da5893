"""What is known of an operation: a rule by name for functions and methods, the kind of a module."""

from __future__ import annotations

import operator

from torch import fx, nn

from . import kinds
from .functions import FUNCTIONS, METHODS, NEW
from .operations import dropout
from .shapes import read_sizes, size_item, view
from .walk import Operation, Rule, Walk, barrier, nothing, options, unchanged

#: what returns the tensor itself or a copy, as the case may be
COPIES = ("contiguous", "float", "double")


def operation(walk: Walk, node: fx.Node) -> Operation:
    """The rule of a node, and its module where it has one that may be followed."""
    if node.op in ("placeholder", "get_attr"):
        return Operation(nothing)
    if node.op == "call_module" and node.target not in walk.fixed:
        module = walk.modules[str(node.target)]
        kind = kinds.of(module)
        known = node in walk.shapes and (kind.in_training or not walk.weights_change)
        silent = isinstance(module, nn.Identity) or (kind.noise and not module.training)
        return Operation(kind.follow if known else barrier, module, kind.makes_new, kind.leaf and silent)
    rule: Rule = barrier
    if node.op == "call_method":
        rule = METHODS.get(str(node.target), barrier)
    elif node.op == "call_function":
        if node.target is operator.getitem and node.args[0] in walk.numbers:
            return Operation(size_item, numbers=True)
        rule = FUNCTIONS.get(node.target, barrier)
    if node not in walk.shapes and rule not in (read_sizes, nothing):
        return Operation(barrier)
    passes_on = rule is unchanged and node.target not in COPIES
    if rule is dropout:
        passes_on = options(node, "input", "p", "training").get("training", True) is False
    return Operation(rule, None, rule in NEW, passes_on, rule in (view, read_sizes))
