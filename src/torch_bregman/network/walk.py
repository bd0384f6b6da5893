"""One walk through a traced network: which channels are constant, which belong together, and which are needed.

A unit whose weights are all zero emits its bias, for every sample and at every position. A `Walk` follows such
constants from operation to operation, one `Wire` per tensor. Channels that only exist together (the two sides of a sum,
the input and the output of a norm) share an id; what may go is decided for ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from . import memory


class Trace(NamedTuple):
    """A network as torch.fx sees it.

    Attributes:
        nodes: its operations.
        shapes: of all tensors.
        fixed: the modules that must stay.
        owned: by name, the parameters and buffers that its own code reads in one place, and nobody else.
    """

    nodes: list[fx.Node]
    shapes: dict[fx.Node, tuple[int, ...]]
    fixed: set[str]
    owned: dict[str, Tensor]


class Wire(NamedTuple):
    """The channels of a tensor: the dimension they lie in, their ids, which are constant, and the constants (float64).

    Everything is on the CPU, where thousands of numbers cost less than one kernel launch.
    """

    dim: int
    ids: Tensor
    constant: Tensor
    value: Tensor


class Call(NamedTuple):
    """A module that may be cut, the wires into it and out of it, its units that live, and its input's positions.

    `tensors`: where it stands for a function, the full names of its own tensors; `name` is one of them.
    """

    name: str
    module: nn.Module
    source: Wire
    output: Wire
    alive: Tensor
    positions: tuple[int, ...]
    tensors: Mapping[str, str] = MappingProxyType({})


#: (walk, node, its module or None) → the wire of the result, or None: a tensor from which nothing goes
Rule = Callable[["Walk", fx.Node, Any], "Wire | None"]


class Operation(NamedTuple):
    """What is known of a node.

    Attributes:
        rule: to follow it.
        module: the one that is called.
        makes_new: whether nobody else has the tensor it makes.
        passes_on: whether it returns the very tensor that it was given.
        numbers: whether the rule itself looks at the sizes among the arguments.
    """

    rule: Rule
    module: Any = None
    makes_new: bool = False
    passes_on: bool = False
    numbers: bool = False


class Walk:
    """The wires of all tensors, for given live units. A subclass says what is known of an operation.

    Attributes:
        weights_change: whether those that are zero may come alive; else all of them are known.
        alive: by name of a module, which of its units live; all, where there is no name.
        wires: by node, or None where nothing can go.
        numbers: by node that is a number of channels or holds one, the wire of the tensor that it was read from.
        calls: the modules that may be cut.
        pairs: ids that only exist together.
        joined: those of them that an operation makes one channel of.
    """

    weights_change: bool

    def __init__(self, model: nn.Module, trace: Trace, alive: Mapping[str, Tensor]) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = trace.shapes
        self.fixed, self.owned = trace.fixed, trace.owned
        self.alive = alive
        self.wires: dict[fx.Node, Wire | None] = {}
        self.numbers: dict[fx.Node, Wire] = {}
        self.calls: list[Call] = []
        self.count = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.joined: list[tuple[Tensor, Tensor]] = []
        self.order = {node: i for i, node in enumerate(trace.nodes)}
        self.operations: dict[fx.Node, Operation] = {}
        for node in trace.nodes:
            self.operations[node] = operation = self.operation(node)
            self.node, self.module = node, operation.module
            self.wires[node] = operation.rule(self, node, operation.module)
            if not operation.numbers:
                self.hold_numbers(node.all_input_nodes)
            if memory.writes(node, self.modules):
                self._overwritten(node, node.all_input_nodes[:1])
            elif memory.may_write(node, self.modules):
                self._overwritten(node, node.all_input_nodes)

    # ---- what a subclass says

    def operation(self, node: fx.Node) -> Operation:
        """What is known about the operation of a node."""
        raise NotImplementedError

    def hold(self, ids: Tensor) -> None:
        """The operation at hand needs these channels."""
        raise NotImplementedError

    def vary(self, ids: Tensor) -> None:
        """These channels are not constant."""
        raise NotImplementedError

    # ---- what rules are made of

    def new(self, n: int) -> Tensor:
        """Ids for n channels that did not exist before."""
        self.count += n
        return torch.arange(self.count - n, self.count)

    def join(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """An operation makes one channel of these."""
        self.pairs += pairs
        self.joined += pairs

    def emit(self, dim: int, ids: Tensor, constant: Tensor, value: Tensor) -> Wire:
        """A wire; ids that have a channel which is not constant are reported."""
        constant = constant & value.isfinite()
        self.vary(ids[~constant])
        return Wire(dim, ids, constant, value.double().where(constant, 0.0))

    def at(self, node: fx.Node, dim: int) -> Wire:
        """The wire of a tensor whose channels are to lie in `dim`: if they do not, all of them stay."""
        wire = self.wires[node]
        if wire is not None and wire.dim == dim:
            return wire
        if wire is not None:
            self.hold(wire.ids)
        n = self.shapes[node][dim]
        ids = self.new(n)
        self.hold(ids)
        return Wire(dim, ids, torch.zeros(n, dtype=torch.bool), torch.zeros(n).double())

    def hold_numbers(self, nodes: list[fx.Node]) -> None:
        """These are used: what is a number of channels has to stay what it is."""
        for n in nodes:
            if n in self.numbers:
                self.hold(self.numbers[n].ids)

    def forget(self, node: fx.Node) -> None:
        """Nothing is known of this tensor any more, and nothing goes from it."""
        wire = self.wires[node]
        if wire is not None:
            self.hold(wire.ids)
            self.wires[node] = None

    def _overwritten(self, node: fx.Node, written: list[fx.Node]) -> None:
        """An operation wrote to its inputs, and others that use them later will find what it wrote."""

        def shares(n: fx.Node) -> bool:
            return not self.operations[n].makes_new or memory.writes(n, self.modules)

        def whole(n: fx.Node) -> fx.Node:
            while n.all_input_nodes and (self.operations[n].passes_on or memory.writes(n, self.modules)):
                n = n.all_input_nodes[0]
            return n

        for other in memory.sharing(written, self.order, self.order[node], shares):
            if all(self.order[user] <= self.order[node] for user in other.users):
                continue
            if memory.writes(node, self.modules) and whole(other) is whole(node) and self.wires[node] is not None:
                self.wires[other] = self.wires[node]
            else:
                self.forget(other)


def components(n: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of n ids the smallest that it is connected with."""
    label = torch.arange(n)
    if not pairs:
        return label
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while not torch.equal(label[a], label[b]):
        low = torch.minimum(label[a], label[b])
        # The labels themselves are joined as well as the ids: chains then shrink by half, not by one.
        for target in (label[a], label[b], a, b):
            label = label.scatter_reduce(0, target, low, "amin")
        label = label[label]
    return label


def numbers(values: Tensor) -> Tensor:
    """As float64 on the CPU."""
    return values.detach().cpu().double()


# ---- the rules that all others are made of


def nothing(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """A tensor without a wire, made of nothing that has one."""
    return None


def barrier(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Nothing is known: everything that goes in stays."""
    for n in node.all_input_nodes:
        if (wire := walk.wires[n]) is not None:
            walk.hold(wire.ids)
    return None


def options(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name; `names` are those that may come by position."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def only_input(walk: Walk, node: fx.Node) -> Wire | None:
    """The wire of the first argument, if it is a tensor with a wire."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return walk.wires[first] if isinstance(first, fx.Node) else None


def channelwise(rule: Callable[[Walk, fx.Node, Any, Wire], Wire | None]) -> Rule:
    """A rule that only has something to say about the wire of the first argument."""

    def wrapped(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        wire = only_input(walk, node)
        return barrier(walk, node, module) if wire is None else rule(walk, node, module, wire)

    return wrapped


@channelwise
def unchanged(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """What comes out is what goes in."""
    return wire


@channelwise
def zeros_stay(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """Zeros stay zeros; of other constants nothing is known."""
    return walk.emit(wire.dim, wire.ids, wire.constant & (wire.value == 0), wire.value)
