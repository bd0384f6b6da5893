"""The compact network of a coarse phase: dense, without dead units, on the live rows that the optimizer holds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..network import kinds
from ..network.graph import Cut, Graph
from ..part import Part, Piece
from .live import Live

_OWN = frozenset(nn.Module().__dict__)


class _CompactLayer:
    """A layer whose weight has the live rows and all inputs; it computes with the inputs that are there.

    The others are constants: what they contribute is computed from the same weight, so that the gradient is that of
    the whole layer. Rows that are not alive but whose outputs others need are zero.

    Attributes:
        kind: of the original.
        row: the shape of a row of its weight.
        outputs: how many outputs there are.
        rows: which of the rows that it holds are used; None for all.
        where: which outputs the rows belong to; None for all.
        inputs: the inputs that are there; None for all.
        gone, constants: the other inputs that are not zero, and what they are.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.weight.view(len(self.weight), *self.row)
        if self.rows is not None:
            weight = weight.index_select(0, self.rows)
        if self.where is not None:
            zeros = weight.new_zeros(self.outputs, *self.row)
            weight = zeros.index_copy(0, self.where, weight)
        bias, there = self.bias, weight if self.inputs is None else weight.index_select(1, self.inputs)
        border = None
        if self.constants is not None:
            gone = weight.index_select(1, self.gone)
            if gone.dim() > 2 and self.kind.padded(self):
                border = self.kind.constant_image(self, gone, self.constants, tuple(x.shape[2:]))
            else:
                shift = (gone if gone.dim() == 2 else gone.flatten(2).sum(2)) @ self.constants
                bias = shift if bias is None else bias + shift
        y = self.kind.dense(self, x, there, bias)
        return y if border is None else y + border


@functools.cache
def _compact(base: type[nn.Module]) -> type[nn.Module]:
    """A class of layers like those of `base`, a class of modules."""
    return type(base.__name__, (_CompactLayer, base), {})


class CompactNetwork:
    """A smaller network for the cuts of a graph, to be trained in place of the original.

    Containers are shallow copies that run the same Python code, modules that are cut have smaller copies, all other
    modules are the original's own: train() and eval() of either network reach them. `model` computes what the original
    computes in the mode in which the cuts were made, as long as nothing is trained outside of it.

    Args:
        graph, cuts: the original, and what remains of its modules.
        lives: the live parts that some parameters have already; of a layer with dead units, its live rows.

    Attributes:
        model: the small network.
        lives: the live parts of all parameters that it restricts, those that were given and, of the units that are
            left, biases and the parameters of norms. Other parameters are the original's own.
        shares: of the multiplications of each cut layer, by name, how many remain.
        passes: forward passes in training mode that the running statistics of the original have not seen yet.
    """

    def __init__(self, graph: Graph, cuts: Mapping[str, Cut], lives: list[Live]) -> None:
        self.original = graph.model
        self.lives: list[Live] = []
        self.shares: dict[str, float] = {}
        self.passes = 0
        self._given = {live.full: live for live in lives}
        self._statistics: list[Piece] = []
        self._norms: list[tuple[Any, Cut]] = []
        self._copied: list[tuple[Tensor, int]] = []
        small: dict[int, nn.Module] = {}
        for name, cut in cuts.items():
            module: Any = graph.model.get_submodule(name)
            if kinds.of(module).statistics:
                small[id(module)] = self._norm(module, cut)
                continue
            small[id(module)] = self._layer(module, cut)
            inputs = module.weight.shape[1] if cut.inputs is None else len(cut.inputs)
            size = module.weight.shape[0] * module.weight.shape[1]
            self.shares[name] = len(cut.outputs) * inputs / max(size, 1)
        self.model = _rebuild(graph.model, small)

    def restricts(self, parameter: Tensor) -> bool:
        """Whether it computes with a live part of this parameter."""
        return any(live.full is parameter for live in self.lives)

    def up_to_date(self) -> bool:
        """Whether the parameters that were not trained when it was made still rest."""
        return not any(full.requires_grad or full._version != version for full, version in self._copied)

    # ---- its modules

    def _layer(self, module: Any, cut: Cut) -> nn.Module:
        kind = kinds.of(module)
        if not kind.rows_are_outputs:
            raise ValueError(f"{kind!r} does not hold its outputs as rows, so that no live rows can be trained alone.")
        small = _shallow(module, _compact(type(module)))  # type: ignore[arg-type]
        small.kind = kind
        device = module.weight.device
        held = torch.arange(len(module.weight))
        if module.weight in self._given:
            held = self._given[module.weight].where.index.cpu()
            self._put(small, "weight", self._given[module.weight])
        self._rows(small, module, "bias", cut.outputs)
        small.row = tuple(module.weight.shape[1:])
        small.outputs = len(cut.outputs)
        rows = where = inputs = gone = constants = None
        if len(cut.alive) < len(held):  # a depthwise layer loses channels that others do not emit any more
            rows = torch.searchsorted(held, cut.alive).to(device)
        if len(cut.alive) < len(cut.outputs):
            where = torch.searchsorted(cut.outputs, cut.alive).to(device)
        if cut.inputs is None:  # depthwise, or group by group
            small.groups = module.groups * small.outputs // module.out_channels
            small.in_channels = small.groups * module.weight.shape[1]
        elif len(cut.inputs) < module.weight.shape[1]:
            inputs = cut.inputs.to(device)
            lost = torch.ones(module.weight.shape[1], dtype=torch.bool)
            lost[cut.inputs] = False
            if cut.input_constants is not None and cut.input_constants.any():
                gone = lost.nonzero().view(-1)[cut.input_constants != 0].to(device)
                constants = cut.input_constants[cut.input_constants != 0].to(module.weight)
        buffers = {"rows": rows, "where": where, "inputs": inputs, "gone": gone, "constants": constants}
        for name, value in buffers.items():
            small.register_buffer(name, value)
        return small

    def _norm(self, module: Any, cut: Cut) -> nn.Module:
        small = _shallow(module)
        for name in ("weight", "bias"):
            self._rows(small, module, name, cut.outputs)
        for name in ("running_mean", "running_var"):
            full = getattr(module, name)
            if full is not None:
                part = Part(full, index=(cut.outputs,))
                small._buffers[name] = part.restrict(full)
                self._statistics.append(Piece(full, small._buffers[name], part))
        small.num_features = len(cut.outputs)
        self._norms.append((module, cut))
        return small

    def _rows(self, small: Any, module: Any, name: str, kept: Tensor) -> None:
        """Give `small` the rows of a parameter that are kept; of one of which all are, the parameter itself."""
        full = getattr(module, name)
        if full is None:
            return
        if full in self._given:
            self._put(small, name, self._given[full])
        elif len(kept) < len(full) and full.requires_grad:
            self._put(small, name, Live(full, Part(full, (), kept)))
        elif len(kept) < len(full):
            small._parameters[name] = nn.Parameter(full.detach()[kept.to(full.device)], requires_grad=False)
            self._copied.append((full, full._version))

    def _put(self, small: Any, name: str, live: Live) -> None:
        small._parameters[name] = live.values
        self.lives.append(live)

    # ---- its running statistics

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Let the running statistics of the original follow the `passes` that they have not seen.

        Channels that remained take theirs from the small network; those that were left out get what as many batches
        of their constant make of them. The batch counters are the original's own and have counted.
        """
        if not self.passes:
            return
        for piece in self._statistics:
            piece.prolong(piece.small, piece.full)
        for module, cut in self._norms:
            mean, variance, counter = module.running_mean, module.running_var, module.num_batches_tracked
            if not module.training or mean is None or variance is None or cut.norm_constants is None:
                continue
            if module.momentum is None:  # the average of all batches so far
                count = 0 if counter is None else int(counter)
                kept = max(count - self.passes, 0) / max(count, 1)
            else:
                kept = math.pow(1 - module.momentum, self.passes)
            gone = torch.ones(len(mean), dtype=torch.bool)
            gone[cut.outputs] = False
            gone = gone.to(mean.device)
            constants = cut.norm_constants.to(mean)
            mean.copy_(torch.where(gone, constants + (mean - constants) * kept, mean))
            variance.copy_(torch.where(gone, variance * kept, variance))
        self.passes = 0


def _shallow(module: nn.Module, kind: Any = None) -> Any:
    """A module with the same attributes, whose parameters, buffers, children and hooks can be exchanged one by one."""
    kind = kind or type(module)
    copy = kind.__new__(kind)
    copy.__dict__ = {
        name: value.copy() if name in _OWN and isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    return copy


def _rebuild(model: nn.Module, small: dict[int, nn.Module]) -> nn.Module:
    """`model` with the modules in `small` (by id of the original) in place; whatever holds none of them is shared."""
    if id(model) not in small:
        small[id(model)] = model
        children = {n: None if m is None else _rebuild(m, small) for n, m in model._modules.items()}
        if any(children[name] is not module for name, module in model._modules.items()):
            copy = _shallow(model)
            copy._modules = children
            kinds.of(copy).part_replaced(copy)
            small[id(model)] = copy
    return small[id(model)]
