"""The compact network of a coarse phase: dense, without dead units, on the live rows that the optimizer holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..network import kinds
from ..network.graph import Cut, Graph
from ..part import Part
from .compact import Compact, _shallow, convolve
from .layers import Chain, Live, Watch


class _Narrow:
    """A layer whose weight has the live rows and all inputs; it computes with the inputs that are there.

    The others are constants: what they contribute is computed from the same weight, so that the gradient is that of
    the whole layer. Rows that are not alive but whose outputs others need are zero.
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
        if self.fed is not None:
            gone = weight.index_select(1, self.gone)
            if gone.dim() == 2:
                shift = gone @ self.fed
            elif self.kind.padded(self):
                shift, border = None, self.kind.constant_image(self, gone, self.fed, tuple(x.shape[2:]))
            else:
                shift = gone.flatten(2).sum(2) @ self.fed
            if shift is not None:
                bias = shift if bias is None else bias + shift
        if there.dim() == 2:
            return F.linear(x, there, bias)
        y = convolve(self, x, there, bias)
        return y if border is None else y + border


class _Linear(_Narrow, nn.Linear):
    pass


class _Conv1d(_Narrow, nn.Conv1d):
    pass


class _Conv2d(_Narrow, nn.Conv2d):
    pass


class _Conv3d(_Narrow, nn.Conv3d):
    pass


_KINDS: dict[type, type] = {nn.Linear: _Linear, nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


class Narrow(Compact):
    """The compact network of a graph for training: `model` computes what the original computes in its present mode.

    Args:
        graph, cuts: see there.
        lives: the live parts that some parameters have already; of a layer with dead units, its live rows.

    Attributes:
        lives: the live parts of all parameters that it restricts, those that were given and, of the units that are
            left, biases and the parameters of norms. Other parameters are the original's own.
        shares: of the multiplications of each cut layer, by name, how many remain.
        passes: forward passes in training mode that the running statistics of the original have not seen yet.
    """

    def __init__(self, graph: Graph, cuts: Mapping[str, Cut], lives: list[Live]) -> None:
        self._given = {live.full: live for live in lives}
        self.lives: list[Live] = []
        self.passes = 0
        self.shares: dict[str, float] = {}
        super().__init__(graph, cuts)
        for name, cut in cuts.items():
            weight: Any = graph.model.get_submodule(name).weight
            if weight is not None and weight.dim() > 1:
                inputs = weight.shape[1] if cut.inputs is None else len(cut.inputs)
                self.shares[name] = len(cut.outputs) * inputs / max(weight.shape[0] * weight.shape[1], 1)

    def _slice(self, owner: Any, full: nn.Module, name: str, *index: Tensor | None) -> None:
        tensor, kept = getattr(full, name), index[0]
        if not isinstance(tensor, nn.Parameter):
            super()._slice(owner, full, name, *index)
            return
        assert kept is not None
        if tensor in self._given:
            self._own(owner, name, self._given[tensor])
        elif len(kept) < len(tensor) and tensor.requires_grad:
            self._own(owner, name, Live(tensor, Part(tensor, (), kept)))
        elif len(kept) < len(tensor):
            owner._parameters[name] = nn.Parameter(tensor.detach()[kept.to(tensor.device)], requires_grad=False)

    def _own(self, owner: Any, name: str, live: Live) -> None:
        owner._parameters[name] = live.values
        self.lives.append(live)

    def _layer(self, module: Any, cut: Cut) -> nn.Module:
        small: Any = _shallow(module, _KINDS[type(module)])
        small.kind = kinds.of(module)
        device = module.weight.device
        if module.weight in self._given:
            self._own(small, "weight", self._given[module.weight])
        self._slice(small, module, "bias", cut.outputs)
        small.row = tuple(module.weight.shape[1:])
        small.outputs = len(cut.outputs)
        rows = where = inputs = gone = fed = None
        if module.weight not in self._given and len(cut.alive) < len(module.weight):
            rows = cut.alive.to(device)  # channels that a depthwise layer passes on; its own weights are not restricted
        if len(cut.alive) < len(cut.outputs):
            where = torch.searchsorted(cut.outputs, cut.alive).to(device)
        if cut.inputs is None:  # depthwise, or group by group
            small.groups = module.groups * small.outputs // module.out_channels
            small.in_channels = small.groups * module.weight.shape[1]
        elif len(cut.inputs) < module.weight.shape[1]:
            inputs = cut.inputs.to(device)
            lost = torch.ones(module.weight.shape[1], dtype=torch.bool)
            lost[cut.inputs] = False
            assert cut.input_constants is not None
            if cut.input_constants.any():
                gone = lost.nonzero().view(-1)[cut.input_constants != 0].to(device)
                fed = cut.input_constants[cut.input_constants != 0].to(module.weight)
        for name, value in (("rows", rows), ("where", where), ("inputs", inputs), ("gone", gone), ("fed", fed)):
            small.register_buffer(name, value)
        return small


def _is_part_of(short: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> bool:
    """Whether `short` are inputs of the same kind with fewer samples."""
    kinds = [[(x.shape[1:], x.dtype, x.device) for x in some] for some in (short, batch)]
    return kinds[0] == kinds[1] and sum(x.numel() for x in short) < sum(x.numel() for x in batch)


class Whole(Watch):
    """The network: remembers what it was called with, and while there is a compact one sends training calls there.

    Attributes:
        inputs: of the largest batch like the last one, in training mode; None if the network cannot be traced with
            them. A short batch says little about what is faster.
        narrow: the compact network.
        chain: what watches the network if it is a Sequential.
        on_call: called before the compact network is used, or, where one is `expected`, made.
    """

    def __init__(self, module: nn.Module, on_call: Callable[[], None], chain: Chain | None) -> None:
        super().__init__(module)
        self.on_call, self.chain = on_call, chain
        self.inputs: tuple[Tensor, ...] | None = None
        self.narrow: Narrow | None = None
        self.expected = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the compact network makes of a training call; None where the network shall compute as ever."""
        if torch.compiler.is_compiling():
            return None
        if not self.module.training:
            self.catch_up()
            return self._itself(*args, **kwargs)
        plain = not kwargs and all(type(x) is Tensor for x in args)
        if not plain:
            self.inputs = None
        elif self.inputs is None or not _is_part_of(args, self.inputs):
            self.inputs = tuple(x.detach() for x in args)
        if self.narrow is not None or self.expected:
            self.on_call()
        if self.narrow is None:
            return self._itself(*args, **kwargs)
        self.narrow.passes += 1
        return self.narrow.model.forward(*args, **kwargs)

    def _itself(self, *args: Any, **kwargs: Any) -> Any:
        """A network that is a Sequential has two watches."""
        return None if self.chain is None or len(args) != 1 or kwargs else self.chain.forward(*args)

    def catch_up(self) -> None:
        """Bring the running statistics of the network up to date."""
        if self.narrow is not None and self.narrow.passes:
            self.narrow.finish(self.narrow.passes)
            self.narrow.passes = 0
