"""A chain of layers as tables of their live weights, and one call of a compiled loop for the whole of it."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import threads
from .links import links_of, of_rows
from .program import columns, panels

ONE_THREAD_WORK = 1 << 16  # multiplications of a vector that are over before a second thread has woken up
WAYS = ("columns", "panels of 1", "panels of 2", "panels of 4")


class Chain(nn.Module):
    """Layers one after the other, on their live weights alone: a snapshot, for inference.

    Linear layers take samples in any number of dimensions: [batch, tokens, features], or one vector. What the chain
    was not built for (another dtype, device or size of image, or an input that asks for a gradient) goes through the
    same layers in torch.

    Args:
        modules: Linear and Conv2d with what is fused to them.
        shape: of a sample: all dimensions but the first, or the last alone where only Linear layers come.
        way: one of `WAYS`: sample by sample, or so many vectors of 16 samples at a time.
        spread: over torch's threads, where there is enough to do.

    Raises:
        Unfit: modules that are no chain, or too large for this way.
    """

    def __init__(self, modules: list[nn.Module], shape: tuple[int, ...], way: str, spread: bool = True) -> None:
        super().__init__()
        from ..kernels import inference as kernel

        self.dense = nn.Sequential(*modules)
        self.shape, self.way, self.spread = tuple(shape), way, spread
        links = links_of(modules, self.shape)
        self.result = links[-1].result
        self.rows = of_rows(modules)
        program = columns(links) if way == "columns" else panels(links, int(way.split()[-1]))
        self._keep = program.keep  # whose addresses the program holds
        self._program, self._samples, self._size = program.address, program.samples, program.size
        self._loop = kernel.columns() if way == "columns" else kernel.panels()
        # what a piece takes, in multiplications of a vector (of a number, where it goes sample by sample)
        self._work = sum(int(torch.count_nonzero(link.weight)) * math.prod(link.image[1:]) for link in links)
        self._work *= max(1, self._samples // kernel.LANES)
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._loop.address)
        self._head = ctypes.c_int64 * kernel.HEAD
        self._spare: list[Tensor] = []  # scratch memory between calls; each call takes its own
        self._ready = self._make_ready((1, *self.shape))

    def __reduce__(self) -> Any:
        return Chain, (list(self.dense), self.shape, self.way, self.spread)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            layers = [module for module in self._modules.get("dense") or () if module._parameters]  # type: ignore[union-attr]
            if len(layers) != 1:
                raise
            return getattr(layers[0], name)  # networks look at the weight of a layer, or how wide it is

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready  # for inputs like the last one: at batch 1 every microsecond here counts
        if x.shape != ready[0] or x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad:
            fits = (x.shape[-1:] if self.rows else x.shape[1:]) == self.shape
            if not fits or x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad:
                return self.dense(x)
            ready = self._ready = self._make_ready(x.shape)
        _, result, samples, pieces, alone = ready
        count = 1 if alone else torch.get_num_threads()
        need = self._size * count
        x, y = x.contiguous(), x.new_empty(result)
        try:
            room = self._spare.pop()
            if room.numel() < need:
                room = x.new_zeros(need)
        except IndexError:
            room = x.new_zeros(need)  # zeros, for what lies around padded images is never written
        head = self._head(0, 0, count, pieces, samples, x.data_ptr(), y.data_ptr(), room.data_ptr(), self._program)
        if count == 1:
            self._call(head)
        else:
            threads.run(self._loop, ctypes.addressof(head), alone=False)
        self._spare.append(room)
        return y

    def _make_ready(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """(shape of the input, of the output, samples, pieces, whether one thread does them all)."""
        lying = shape[:-1] if self.rows else shape[:1]
        samples = math.prod(lying)
        pieces = -(-samples // self._samples)
        alone = not self.spread or pieces <= 1 or pieces * self._work < ONE_THREAD_WORK
        return shape, (*lying, *self.result), samples, pieces, alone

    def spreads(self, shape: torch.Size) -> bool:
        """Whether such an input would occupy several threads."""
        return torch.get_num_threads() > 1 and not self._make_ready(shape)[4]
