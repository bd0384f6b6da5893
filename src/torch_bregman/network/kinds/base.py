"""What a kind of layer tells about itself, and the registry of kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from ..heads import HeadsRule, stop
from ..walk import Walk, Wire, barrier

Options = Mapping[str, bool | int | str | None]


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a layer whose units or inputs are removed. Indices are int64, sorted, on the CPU.

    Attributes:
        outputs, inputs: those that stay; None for all.
        weight: of a kind that `mixes`, its `matrix` there, with the constants of removed inputs folded in.
        shift: what else they contribute, [outputs]; None for zero.
    """

    outputs: Tensor | None
    inputs: Tensor | None = None
    weight: Tensor | None = None
    shift: Tensor | None = None


class Exchange(Protocol):
    """Puts a part of a parameter or buffer in its place, so that an optimizer's state can follow.

    `parameter`: its name in the module. `index`: per dimension the indices that stay, None for all. `value`: what it
    holds afterwards, where that is not what it held. `owner`, `target`: where the part goes, if not in its old place.
    """

    def __call__(
        self, parameter: str, *index: Tensor | None, value: Tensor | None = None, owner: Any = None,
        target: str | None = None,
    ) -> None: ...  # fmt: skip


class Kind:
    """All that is known of one class of modules. Every default says: nothing is known, it stays as it is.

    There are more methods than a class should have, for this is the whole interface: one for each question that a room
    of the library asks. A kind answers those that it can; `WeightedSum` answers most of them for layers with a weight.

    Attributes:
        module_class: the class. All answers are for exactly this class; of a subclass, whose forward may be another,
            only what it has is known: weights, bias, FLOPs, noise, statistics.
        leaf: whether torch.fx is to see one call, and not what is in it.
        in_training: whether `follow` also holds for weights that still change, so that `tb.Multilevel` can train the
            module without its dead units; needs `dense`, and a weight that is its `matrix`.
        makes_new: whether nobody else has the tensor that it returns, so that the next operation may write to it.
        noise: whether it draws random numbers in training.
        statistics: whether it keeps running statistics of its inputs.
        reads_parts: whether it computes with weights of the modules in it, without calling them.
        reported: whether `shrink` tells what became of it; needs `sizes`.
        has_heads: whether it is an attention whose heads can be taken out; needs `live_heads` and `with_heads`.
        rows_are_outputs: whether row i of its weight is all that makes output i.
        needs_carrier: whether the constants that a `padded` one reads must be carried by a channel.
        follow_heads: the rule for channels that are in two dimensions, heads and their width.
        sparse: how it computes with its live weights alone, set by who can do that; None where nobody can.
        arguments, options: it is built as `module_class(*arguments, **options)`, each read from the attribute of the
            same name: integers, tuples of integers, strings or booleans (`bias`: whether there is one), `options` with
            their defaults. All that the module computes with must follow from them and from its tensors; floating
            point arguments (`eps`) are those of the model that a file is loaded into. None: a file knows the module by
            its tensors alone, and cannot hold a smaller one.
        dims: how many entries a tuple of theirs has, where (3, 3) and 3 mean the same.
    """

    leaf = True
    in_training = False
    makes_new = False
    noise = False
    statistics = False
    reads_parts = False
    reported = False
    has_heads = False
    rows_are_outputs = False
    needs_carrier = False
    follow_heads: HeadsRule = staticmethod(stop)
    sparse: Any = None
    arguments: tuple[str, ...] | None = None
    options: Options = {}
    dims = 0

    def __init__(self, module_class: type[nn.Module]) -> None:
        self.module_class = module_class

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.module_class.__name__})"

    # ---- what it has

    def weights(self, module: Any) -> tuple[str, ...]:
        """The names of its own parameters that are weights: made sparse, drawn, counted."""
        return ()

    def layout(self, module: Any, name: str) -> str | None:
        """How the weight `name` lies, a letter per dimension: o outputs, i inputs, e experts, k kernel.

        None: that is not all that there is to say, see `grouped`.
        """
        return None

    def grouped(self, module: Any, name: str, tensor: Tensor) -> Tensor:
        """A tensor that lies like the weight `name` as [groups, outputs / groups, inputs / groups, kernel size].

        A view where possible. `tensor` may lack the dimensions of the kernel.
        """
        raise NotImplementedError(f"{self!r} has weights, but does not say how they lie.")

    def fan_in(self, module: Any, name: str) -> float:
        """How many inputs an output sums over."""
        shaped = torch.empty(module._parameters[name].shape, device="meta")  # a DTensor would be gathered
        _, _, inputs, kernel = self.grouped(module, name, shaped).shape
        return inputs * kernel

    def bias(self, module: Any, name: str) -> Tensor | None:
        """What it adds to the outputs of the weight `name`."""
        return module._parameters.get("bias")

    def sizes(self, module: Any) -> tuple[int, int]:
        """(outputs, inputs) of a layer, (heads, width) of an attention, (columns, rows) of an embedding."""
        raise NotImplementedError(f"{self!r} is reported, but does not say how large it is.")

    # ---- what it computes

    def positions(self, module: Any, x: torch.Size) -> int:
        """How often its weights are applied to an input of shape `x`."""
        return 0

    def flops(self, module: Any, x: torch.Size, *, zeros: bool = True) -> int:
        """2 · weights · positions: operations for an input of shape `x`, without `zeros` those of live weights."""
        return 0

    def dense(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module makes of `x` with a weight that lies like its own, and a bias, that are given."""
        raise NotImplementedError(f"{self!r} is followed in training, but does not compute with a given weight.")

    # ---- how a walk follows it

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        """The wire of its result; what can be cut is noted in `walk.calls`."""
        return barrier(walk, node, module)

    def mixes(self, module: Any) -> bool:
        """Whether every output may read all inputs, not those of its own channel or group alone."""
        return False

    def matrix(self, module: Any) -> Tensor:
        """What an output is made of: [outputs, inputs / groups, *kernel]."""
        raise NotImplementedError(f"{self!r} may be cut, but does not say what its outputs are made of.")

    def padded(self, module: Any) -> bool:
        """Whether it sees zeros beyond a border, so that what a constant input contributes depends on the position."""
        return False

    def constant_image(self, module: Any, weight: Tensor, x: Tensor, positions: tuple[int, ...]) -> Tensor:
        """What a `padded` one makes of inputs that are constant, x [inputs]: [outputs, *positions of the output].

        `weight`: of these inputs, like `matrix`. `positions`: of the input. Not asked where it `needs_carrier`.
        """
        raise NotImplementedError(f"{self!r} sees zeros beyond a border, but does not say what it makes of constants.")

    # ---- how it is cut

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        """Make it smaller in place: parameters and buffers by `exchange`, then what else says how large it is."""
        raise NotImplementedError(f"{self!r} may be cut, but does not say how.")

    def part_replaced(self, module: Any) -> None:
        """A module in it was replaced by a smaller one."""

    def factors(self, module: Any, rank: int) -> tuple[Any, Any] | None:
        """Two fresh modules that do the same one after the other, rank · (outputs + inputs) weights; None: it stays.

        The weight of each is shaped like a matrix [outputs, inputs · kernel size] of its own, U and V of U·V.
        """
        return None

    def live_heads(self, module: Any) -> Tensor | None:
        """Which heads matter, bool [heads]; None where that cannot be said."""
        return None

    def with_heads(self, module: Any, alive: Tensor, exchange: Exchange) -> nn.Module:
        """A module with these heads alone."""
        raise NotImplementedError(f"{self!r} has heads, but does not say how they are taken out.")


class Inherited(Kind):
    """Of a subclass, whose forward may be another: what it has is known, not what it does with it."""

    leaf = False

    def __init__(self, module_class: type[nn.Module], kind: Kind) -> None:
        super().__init__(module_class)
        self.kind = kind
        for name in ("noise", "statistics", "reads_parts", "has_heads", "rows_are_outputs"):
            setattr(self, name, getattr(kind, name))
        for name in ("weights", "layout", "grouped", "fan_in", "bias", "positions", "flops", "matrix", "part_replaced"):
            setattr(self, name, getattr(kind, name))
        if module_class.forward is kind.module_class.forward:
            self.sparse = kind.sparse


class Unknown(Kind):
    """Of a class that nobody has registered."""

    leaf = False


UNKNOWN = Unknown(nn.Module)
#: by class of modules
REGISTRY: dict[type[nn.Module], Kind] = {}
#: kinds for classes of libraries that are not imported here, by "module.Class"
_FOREIGN: dict[str, Callable[[type[nn.Module]], Kind]] = {}
#: kinds for modules of unknown classes, known by what they hold
_BY_LOOKS: list[tuple[Callable[[nn.Module], bool], Kind]] = []


def register(kind: Kind) -> Kind:
    """Make a kind known everywhere; a class that is registered again, or defined again, takes the new kind.

    Raises:
        TypeError: what is given is no `Kind` of a class of modules.
        ValueError: another class of this name is registered, so that files would take one for the other.
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"Invalid `kind`: {kind!r}; expected an object of a subclass of Kind, as in MyKind(MyModule).")
    cls = kind.module_class
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"Invalid `kind`: {type(kind).__name__} of {cls!r}; expected a class of modules.")
    for other in [other for other in REGISTRY if other.__name__ == cls.__name__ and other is not cls]:
        if REGISTRY[other].arguments is None and f"{other.__module__}.{other.__qualname__}" in _FOREIGN:
            continue  # files do not build it
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"Invalid `kind`: {cls.__name__} of {other.__module__} is registered; rename your class.")
        del REGISTRY[other]
    REGISTRY[cls] = kind
    return kind


def foreign(name: str, kind: Callable[[type[nn.Module]], Kind]) -> None:
    """Make a kind known for a class of another library, by "module.Class": registered where the class is first met."""
    _FOREIGN[name] = kind


def by_looks(looks: Callable[[nn.Module], bool], kind: Kind) -> None:
    """Make a kind known for modules of unknown classes that look like it."""
    _BY_LOOKS.append((looks, kind))


def of(module: nn.Module) -> Kind:
    """The kind of a module; of an unknown subclass of a known class what it inherits, else `UNKNOWN`."""
    cls = type(module)
    kind = REGISTRY.get(cls)
    if kind is not None:
        return kind
    for parent in cls.__mro__:
        if parent not in REGISTRY:
            make = _FOREIGN.get(f"{parent.__module__}.{parent.__qualname__}")
            if make is None:
                continue
            register(make(parent))
        return REGISTRY[cls] if parent is cls else Inherited(cls, REGISTRY[parent])
    return next((kind for looks, kind in _BY_LOOKS if looks(module)), UNKNOWN)


def named(name: str) -> Kind | None:
    """The kind that a file calls by this name, if it is one that files can build."""
    return next((k for c, k in REGISTRY.items() if c.__name__ == name and k.arguments is not None), None)
