"""Which channels can be left out while a network is trained: units whose weights are all zero, and what follows.

An id goes if all its channels are constant and no operation needs them; see walk.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import kinds
from .lookup import operation
from .trace import Untraceable, trace
from .walk import Call, Operation, Trace, Walk, components

__all__ = ["Cut", "Graph", "Untraceable"]


@dataclass(frozen=True, eq=False)
class Cut:
    """What remains of a module. Indices are int64, sorted, on the CPU.

    Attributes:
        outputs: the outputs that remain.
        alive: those of `outputs` whose rows are trained; of a norm, all.
        inputs: the inputs that remain; None for a module that works channel by channel.
        input_constants: the constants of the inputs that were left out, in their order (float64).
        norm_constants: of a norm, the constant that every removed channel takes in (float64; 0 elsewhere).
    """

    outputs: Tensor
    alive: Tensor
    inputs: Tensor | None = None
    input_constants: Tensor | None = None
    norm_constants: Tensor | None = None


def cut_of(call: Call, removed: Tensor) -> Cut | None:
    """What remains of a module once the ids marked in `removed` are gone; None if that is everything."""
    kind = kinds.of(call.module)
    gone = removed[call.output.ids]
    outputs = (~gone).nonzero().view(-1)
    if kind.statistics:
        constants = call.source.value.where(gone, 0.0)
        return Cut(outputs, outputs, norm_constants=constants) if gone.any() else None
    alive = (~gone & call.alive).nonzero().view(-1)
    if not kind.mixes(call.module):
        return Cut(outputs, alive) if len(alive) < len(gone) else None
    lost = removed[call.source.ids]
    if len(alive) == len(gone) and not lost.any():
        return None
    return Cut(outputs, alive, (~lost).nonzero().view(-1), call.source.value[lost])


class TrainingWalk(Walk):
    """The walk through a network that is trained on: weights that are zero in a unit that lives may change."""

    weights_change = True

    def __init__(self, model: nn.Module, trace: Trace, alive: Mapping[str, Tensor]) -> None:
        self.held: list[Tensor] = []
        super().__init__(model, trace, alive)

    def operation(self, node: fx.Node) -> Operation:
        return operation(self, node)

    def hold(self, ids: Tensor) -> None:
        self.held.append(ids)

    def vary(self, ids: Tensor) -> None:
        self.held.append(ids)

    def removed(self) -> Tensor:
        """Which ids go."""
        label = components(self.count, self.pairs)
        held = torch.zeros(self.count, dtype=torch.bool)
        for ids in self.held:
            held[label[ids]] = True
        for call in self.calls:
            ids = label[call.output.ids]
            if not held[ids].any():  # a layer without outputs would be no layer
                held[ids[:1]] = True
        return ~held[label]


class Graph:
    """A network as torch.fx sees it, for `cut`.

    The modules of torch.nn are leaves; of an `nn.TransformerEncoderLayer` the parts are. Nothing about the model
    changes: no parameter, buffer, training flag or random number.

    What the network computes in Python from `in_features`, `out_channels` and the like of its own layers is not seen.

    Args:
        model: the network.
        example_inputs: what its forward takes, in order; arguments beyond keep their defaults. The spatial sizes are
            those of all later inputs, the batch size need not be.

    Raises:
        Untraceable: torch.fx cannot follow the network, or finds another function than it computes.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Tensor, ...]) -> None:
        self.model = model
        self.example_inputs = tuple(example_inputs)
        self._traces: dict[tuple[bool, ...], Trace] = {}
        self.traced()

    def traced(self) -> Trace:
        # A forward may look at `self.training`: each combination of flags has a trace of its own.
        flags = tuple(module.training for module in self.model.modules())
        if flags not in self._traces:
            self._traces[flags] = trace(self.model, self.example_inputs)
        return self._traces[flags]

    def cut(self, alive: Mapping[str, Tensor]) -> dict[str, Cut]:
        """What can be left out, per module that loses outputs, inputs or live rows, in the model's present mode.

        In training mode a constant channel leaves a BatchNorm as its shift, in eval mode as the running statistics
        have it; each norm's own flag counts.

        Args:
            alive: for names of Linear and Conv modules, which units live: bool [out]. The weights of the others must
                be zero. In modules that are not named all units live.

        Raises:
            ValueError: a name that is no Linear or Conv, a mask that does not fit, or a nonzero weight in a unit that
                is said not to live.
        """
        for name, mask in alive.items():
            self._check(name, mask)
        walk = TrainingWalk(self.model, self.traced(), alive)
        removed = walk.removed()
        cuts = {call.name: cut_of(call, removed) for call in walk.calls}
        return {name: cut for name, cut in cuts.items() if cut is not None}

    def _check(self, name: str, mask: Tensor) -> None:
        try:
            module: Any = self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"`alive` names {name!r}; the model has no such module.") from None
        if not kinds.of(module).rows_are_outputs:
            raise ValueError(f"`alive` names {name!r}, a {type(module).__name__}; expected Linear or Conv1d, 2d, 3d.")
        weight = module.weight.detach()
        if mask.dtype != torch.bool or tuple(mask.shape) != (len(weight),):
            raise ValueError(
                f"`alive` of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected bool ({len(weight)},)."
            )
        if weight[~mask.to(weight.device)].any():
            raise ValueError(f"`alive` of {name!r} leaves out units whose weights are not zero.")
