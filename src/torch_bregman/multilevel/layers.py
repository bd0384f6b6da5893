"""Layers that compute with their live weights alone while they are restricted, and as ever otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import DTYPES
from ..part import Part
from .forms import SparseForm
from .hooks import hooked
from .live import Live
from .watch import Watch


class SeenInput(NamedTuple):
    """An input of a layer: its shape, how it lies in memory, and whether a gradient with respect to it is needed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    needs_grad: bool


class WatchedLayer(Watch):
    """A module with a sparse form: which input it saw last, and how it computes now.

    Attributes:
        seen: the last input; None before the first call, and where the sparse form could not have taken it.
        work: floating-point operations of its forward pass in the last training call, 2 · weights · positions.
        live: the weights that it computes with; None where it computes as ever.
        on_training: called before every training call.
        on_edit: called when W was changed from outside, before it is used.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        form: SparseForm,
        on_training: Callable[[], None],
        on_edit: Callable[[], None],
    ) -> None:
        super().__init__(module)
        self.weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
        self.name, self.form, self.on_training, self.on_edit = name, form, on_training, on_edit
        self.seen: SeenInput | None = None
        self.work = 0.0
        self._size = 2.0 * self.weight.numel()
        self.live: Live | None = None

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor | None:
        """What the sparse form, with `relu` followed by one, makes of x; None where the module computes as ever."""
        module: Any = self.module
        weight = module._parameters["weight"]
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        dtype = weight.dtype if self.live is None else self.live.plain.dtype
        training = torch.is_grad_enabled()
        if training:
            self.on_training()
            self.work = self._size * self.form.kind.positions(module, x.shape)
        fits = kernels.available() and x.dtype == dtype and x.dtype in DTYPES and x.device.type == "cpu" and x.dim() > 1
        if not fits or torch.is_autocast_enabled("cpu"):
            self.seen = None
            return None
        if training and self.live is None and (self.seen is None or x.numel() >= math.prod(self.seen.shape)):
            self.seen = SeenInput(tuple(x.shape), x.stride(), x.requires_grad)
        if self.live is None or self.live.full is not weight:
            return None
        if self.live.edited(closely=not training):
            self.on_edit()
            if self.live is None or self.live.edited(closely=not training):
                return None
        live = self.live
        if training and not live.finished and hooked(live.full):
            return None
        if not training or not live.finished:
            return self.form.compute(module, x, live.values.flatten(), live.entries, near=live.near, relu=relu)
        if not self.form.adds_whole:
            return None
        values = live.values.detach().flatten()
        return self.form.compute(module, x, values, live.entries, whole=weight, near=live.near, relu=relu)


def live_part(full: nn.Parameter, where: Part, near: Part | None, layers: list[WatchedLayer]) -> Live:
    """The live part of a weight, for the layers that may compute with it alone."""
    if not layers:
        return Live(full, where, near)
    pattern = layers[0].form.pattern
    if where.spans:  # whole kernels
        return Live(full, where, None, pattern(full, where.entries))
    return Live(full, pattern(full, where.index), pattern(full, near.index) if near is not None else None)
