"""The copy of a network that is made smaller, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn

from ..network import kinds
from ..network.copied import copied
from ..network.kinds import Exchange, Kind
from ..network.kinds.base import Inherited
from ..part import Part, Piece
from .report import Row


@dataclass
class Outcome:
    """What is known of a layer so far, for its row in the report."""

    kind: str
    before: tuple[int, int]
    kept: int = 0
    reason: str = ""
    rank: int | None = None


class ShrinkingCopy:
    """A copy of the network that is cut, and which part of which parameter each new one is.

    Attributes:
        original, model: the network that was given, and the copy.
        notes: what there is to know beside the rows.
        code: of the copy, where that has to change.
        traced: makes such code in any case, for a network whose own code does not work with other sizes.
        parts: of the original's parameters, what became of each.
        outcomes: by name of a layer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.original = model
        self.model = copied(model).eval()
        for p in self.model.parameters():
            p.grad = None
        self.notes: list[str] = []
        self.code: fx.Graph | None = None
        self.traced: Callable[[], fx.Graph] | None = None
        self.parts: dict[nn.Parameter, list[Piece]] = {}
        self.outcomes: dict[str, Outcome] = {}
        # Every module of the original, and the one of the copy that is cut.
        self.twins = {name: (old, self.model.get_submodule(name)) for name, old in model.named_modules()}
        read: set[int] = set()  # what the module around it computes with, in its own way
        for name, module in self.model.named_modules():
            if kinds.of(module).reads_parts:
                read |= {id(part) for part in module.modules()}
            if kinds.of(module).reported or (known(module).reported and id(module) not in read):
                self.outcomes[name] = Outcome(type(module).__name__, sizes_of(module))

    def exchange(self, name: str) -> Exchange:
        """What puts parts of parameters and buffers of the module `name` in their place."""
        return partial(self._exchange, name)

    def lend(self, tensors: Mapping[str, str], layer: nn.Module) -> Exchange:
        """The same for a layer whose tensors have these full names, and which is told what becomes of them."""

        def exchange(parameter: str, *index: Tensor | None, value: Tensor | None = None, **_: Any) -> None:
            if parameter in tensors:
                owner, leaf = tensors[parameter].rpartition(".")[::2]
                self._exchange(owner, leaf, *index, value=value)
                setattr(layer, parameter, getattr(self.twins[owner][1], leaf))

        return exchange

    def _exchange(
        self, name: str, parameter: str, *index: Tensor | None, value: Tensor | None = None, owner: Any = None,
        target: str | None = None,
    ) -> None:  # fmt: skip
        old, new = self.twins[name]
        inside, _, leaf = parameter.rpartition(".")
        full = getattr(old.get_submodule(inside), leaf)
        if full is None:
            return
        part = Part(full, index=index)
        small = part.restrict(full) if value is None else value.to(full.detach())
        owner, target = owner or new, target or leaf
        if isinstance(full, nn.Parameter):
            setattr(owner, target, nn.Parameter(small, requires_grad=full.requires_grad))
            self.parts.setdefault(full, []).append(Piece(full, getattr(owner, target), part))
        else:
            setattr(owner, target, small)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put another module in the place of the one of this name."""
        if not name:
            self.model = module
            return
        parent, _, child = name.rpartition(".")
        owner: Any = self.model.get_submodule(parent)
        setattr(owner, child, module)
        kinds.of(owner).part_replaced(owner)

    def finish(self) -> None:
        """The cut network, in training or not as the original is."""
        flags = {name: module.training for name, module in self.original.named_modules()}
        for name, module in self.model.named_modules():
            while name not in flags:  # a part of what took a module's place
                name = name.rpartition(".")[0]
            module.training = flags[name]
        if self.code is not None:
            self.rewrite(self.code)

    def rewrite(self, code: fx.Graph) -> None:
        """Make the cut network a GraphModule."""
        for node in code.nodes:
            node.type = None  # an annotation that is a string cannot be pickled
        training = self.model.training
        self.code, self.model = code, fx.GraphModule(self.model, code, type(self.original).__name__)
        self.model.training = training

    def rows(self) -> list[Row]:
        """What became of each layer."""
        rows = []
        for name, known in self.outcomes.items():
            old, new = self.original.get_submodule(name), self.model.get_submodule(name)
            before, after = (sum(p.numel() for p in m.parameters()) for m in (old, new))
            rows.append(Row(name, after=sizes_of(new), parameters=(before, after), **vars(known)))
        return rows


def sizes_of(module: Any) -> tuple[int, int]:
    """(outputs, inputs), (heads, width) or (columns, rows)."""
    if isinstance(module, nn.Sequential):
        return sizes_of(module[-1])[0], sizes_of(module[0])[1]
    return known(module).sizes(module)


def known(module: nn.Module) -> Kind:
    """The kind of a module; of a subclass, that of the class that it is derived from."""
    kind = kinds.of(module)
    return kind.kind if isinstance(kind, Inherited) else kind
