"""The smaller network that computes what a network with dead units computes, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from ..network.graph import Cut, Graph
from ..network.kinds.conv import is_miscomputed
from ..network.trace import leaving_unchanged, without_noise
from ..part import Part, Piece

# ---- modules of the small network


def convolve(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the convolution `module` makes of `x` with another weight and bias."""
    if is_miscomputed(module, weight):
        down, right = module.stride
        return F.conv2d(x[..., ::down, ::right], weight, bias, groups=module.groups)
    return module._conv_forward(x, weight, bias)


class _Rows:
    """A layer whose weight holds the live rows alone; the other outputs have zero rows and keep their bias.

    `where` says which outputs the rows belong to (None: all), `constant` is what the inputs that were left out
    contribute: to every position alike, or per position.
    """

    def _rows(self: Any) -> Tensor:
        if self.where is None:
            return self.weight
        return self.weight.new_zeros(self.outputs, *self.weight.shape[1:]).index_copy(0, self.where, self.weight)

    def _shift(self: Any) -> Tensor | None:
        if self.constant is None or self.constant.dim() > 1:
            return self.bias
        return self.constant if self.bias is None else self.bias + self.constant

    def _finish(self: Any, y: Tensor) -> Tensor:
        if self.constant is None or self.constant.dim() == 1:
            return y
        if y.shape[1:] != self.constant.shape:
            raise ValueError(
                f"A layer returns {tuple(y.shape[1:])} per sample, but its constant was computed for "
                f"{tuple(self.constant.shape)}: the network was cut for inputs of another size."
            )
        return y + self.constant.to(y.dtype)


class _Linear(_Rows, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._rows(), self._shift())


class _Convolution(_Rows):
    def forward(self, x: Tensor) -> Tensor:
        return self._finish(convolve(self, x, self._rows(), self._shift()))


class _Conv1d(_Convolution, nn.Conv1d):
    pass


class _Conv2d(_Convolution, nn.Conv2d):
    pass


class _Conv3d(_Convolution, nn.Conv3d):
    pass


_ROWS: dict[type, type] = {nn.Linear: _Linear, nn.Conv1d: _Conv1d, nn.Conv2d: _Conv2d, nn.Conv3d: _Conv3d}


_OWN = frozenset(nn.Module().__dict__)


def _shallow(module: nn.Module, kind: Any = None) -> Any:
    """A module with the same attributes, whose parameters, buffers, children and hooks can be exchanged one by one."""
    kind = kind or type(module)
    copy = kind.__new__(kind)
    copy.__dict__ = {
        name: value.copy() if name in _OWN and isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    return copy


class Compact:
    """The smaller network for the cuts of a graph, to be trained in place of the original.

    Containers are shallow copies that run the same Python code, modules that are cut have smaller copies, all other
    modules are the original's own: train() and eval() of either network reach them. The constants hold for the mode
    in which the cuts were made, and as long as nothing is trained outside the small network.

    Attributes:
        model: the small network.
        slices: the parameters of the cut modules that are trained in it. Biases of units that were left out and rows
            of dead units are not among them; they stay as they are.
        buffers: the running statistics of the cut norms.
    """

    def __init__(self, graph: Graph, cuts: Mapping[str, Cut]) -> None:
        self.original = graph.model
        self.slices: list[Piece] = []
        self.buffers: list[Piece] = []
        self._norms: list[tuple[_BatchNorm, Cut]] = []
        small: dict[int, nn.Module] = {}
        for name, cut in cuts.items():
            module = graph.model.get_submodule(name)
            small[id(module)] = self._norm(module, cut) if isinstance(module, _BatchNorm) else self._layer(module, cut)
        self.model = _rebuild(graph.model, small)

    def _slice(self, owner: Any, full: nn.Module, name: str, *index: Tensor | None) -> None:
        """Exchange a parameter or buffer of `owner` for the kept part of the original's."""
        tensor = getattr(full, name)
        if tensor is None:
            return
        part = Part(tensor, index=index)
        small = part.restrict(tensor)
        if isinstance(tensor, nn.Parameter):
            owner._parameters[name] = parameter = nn.Parameter(small, requires_grad=tensor.requires_grad)
            if tensor.requires_grad:
                self.slices.append(Piece(tensor, parameter, part))
        else:
            owner._buffers[name] = small
            self.buffers.append(Piece(tensor, small, part))

    def _layer(self, module: Any, cut: Cut) -> nn.Module:
        small = _shallow(module, _ROWS[type(module)])
        self._slice(small, module, "weight", cut.alive, *([] if cut.inputs is None else [cut.inputs]))
        self._slice(small, module, "bias", cut.outputs)
        small.outputs = len(cut.outputs)
        where = None
        if len(cut.alive) < len(cut.outputs):
            where = torch.searchsorted(cut.outputs, cut.alive).to(module.weight.device)
        small.register_buffer("where", where)
        small.register_buffer("constant", cut.constant)
        if isinstance(module, _ConvNd):
            small.out_channels = len(cut.outputs)
            if cut.inputs is not None:
                small.in_channels = len(cut.inputs)
            else:
                small.groups = module.groups * len(cut.outputs) // module.out_channels
                small.in_channels = small.groups * module.weight.shape[1]
        else:
            small.out_features, small.in_features = small.outputs, small.weight.shape[1]
        return small

    def _norm(self, module: Any, cut: Cut) -> nn.Module:
        small = _shallow(module)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self._slice(small, module, name, cut.outputs)
        small.num_features = len(cut.outputs)
        self._norms.append((module, cut))
        return small

    @torch.no_grad()
    def finish(self, steps: int) -> None:
        """Bring the running statistics of the original up to date after `steps` training steps of the small network.

        Channels that remained take theirs from the small network; those that were left out get what as many batches
        of their constant make of them. The batch counters are the original's own and have counted.

        Args:
            steps: forward passes in training mode since this object was made.
        """
        for part in self.buffers:
            part.prolong(part.small, part.full)
        for module, cut in self._norms:
            mean, variance, counter = module.running_mean, module.running_var, module.num_batches_tracked
            if not module.training or mean is None or variance is None or cut.norm_constants is None or steps == 0:
                continue
            if module.momentum is None:  # the average of all batches so far
                count = 0 if counter is None else int(counter)
                kept = max(count - steps, 0) / max(count, 1)
            else:
                kept = math.pow(1 - module.momentum, steps)
            gone = torch.ones(len(mean), dtype=torch.bool)
            gone[cut.outputs] = False
            gone = gone.to(mean.device)
            steady = cut.norm_constants.to(mean)
            mean.copy_(torch.where(gone, steady + (mean - steady) * kept, mean))
            variance.copy_(torch.where(gone, variance * kept, variance))

    def check(self, example_inputs: tuple[Tensor, ...]) -> float:
        """The largest absolute difference between the outputs of both networks for these inputs.

        Both run in the mode that they are in, without gradients and without dropout; no state changes.
        """
        with leaving_unchanged(self.original, self.model):
            without_noise(self.original, self.model, norms=False)
            outputs = []
            for model in (self.original, self.model):
                with leaving_unchanged(model):
                    outputs.append(tree_leaves(model(*[x.clone() for x in example_inputs])))
            pairs = [(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, Tensor) and a.numel()]
            return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def _rebuild(model: nn.Module, small: dict[int, nn.Module]) -> nn.Module:
    """`model` with the modules in `small` (by id of the original) in place; whatever holds none of them is shared."""
    if id(model) not in small:
        small[id(model)] = model
        children = {n: None if m is None else _rebuild(m, small) for n, m in model._modules.items()}
        if any(children[name] is not module for name, module in model._modules.items()):
            copy = _shallow(model)
            copy._modules = children
            if isinstance(copy, nn.TransformerEncoderLayer):
                copy.activation_relu_or_gelu = 0  # the fused kernel would take the weights without the rest
            small[id(model)] = copy
    return small[id(model)]
