"""The live part of a weight, and the two operations between the full space and it: restrict and prolong.

Multilevel training goes there and back in every cycle, `shrink` goes there and stays, a sparse file keeps it on disk.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .kernels import DTYPES, threads

Block = tuple[Tensor | None, ...]  # per dimension the kept indices, None for all; dimensions beyond are kept whole

MANY = 1 << 16  # live entries from which a kernel moves them
CHUNK = 1 << 13
FIND = 1 << 16


class Part:
    """The live part of a weight W: its live entries, its live groups, or a block of it.

    `restrict(W)` takes the live part, `prolong(values, W)` writes it back in place. Both work for all that is shaped
    like W: its dual, a moment, a gradient.

    ======================  =====================================  =========================================
    made with               the live part is                       `restrict` returns
    ======================  =====================================  =========================================
    `Part(W)`               the entries of W that are not zero     [live]
    `Part(W, spans)`        the groups that are not all zero; a    [live, size of a group]
                            group spans the dimensions `spans`
    `Part(W, index=tuple)`  the block that the kept indices span   the block, with as many dimensions as W
    ======================  =====================================  =========================================

    Args:
        weight: W.
        spans: the dimensions of a group; () where every entry is one.
        index: a tensor: the live groups, numbered row by row over the other dimensions, instead of those that `weight`
            shows. A tuple: per dimension the kept indices, None for all.
    """

    def __init__(self, weight: Tensor, spans: tuple[int, ...] = (), index: Tensor | Block | None = None) -> None:
        self.full_shape, self.spans = weight.shape, spans
        self.keeps = tuple(d for d in range(weight.dim()) if d not in spans)
        self.kept_shape = tuple(weight.shape[d] for d in self.keeps)
        self.block = index if isinstance(index, tuple) else None
        if not isinstance(index, tuple):
            if index is None:
                plain = weight.detach()
                index = (plain != 0).any(dim=spans).reshape(-1).nonzero() if spans else beyond(plain)
                index = index.reshape(-1)
            self.index = index.to(weight.device, torch.int64)
        self._places: dict[tuple[int, ...], Tensor] = {}

    @functools.cached_property
    def index(self) -> Tensor:
        """The live groups, numbered row by row over the dimensions that a group does not span."""
        # Of a block, which is moved by its indices per dimension, only for those who ask.
        return torch.arange(self.full_shape.numel()).view(self.full_shape)[self._grid()].reshape(-1)

    def __len__(self) -> int:
        """Live groups."""
        return len(self.index) if self.block is None else math.prod(map(len, self._kept()))

    @property
    def size(self) -> int:
        """Live entries."""
        return len(self) * (self.full_shape.numel() // max(1, torch.Size(self.kept_shape).numel()))

    @property
    def density(self) -> float:
        """Live entries over all entries."""
        return self.size / max(self.full_shape.numel(), 1)

    @property
    def in_a_row(self) -> bool:
        """Whether the entries of a group follow one another, so that the live part lies in the order of `entries`."""
        return self.keeps == tuple(range(len(self.keeps)))

    @property
    def entries(self) -> Tensor:
        """The live entries, numbered row by row over all dimensions, where groups lie in a row."""
        size = math.prod(self.full_shape[d] for d in self.spans)
        if size == 1:
            return self.index
        return (self.index[:, None] * size + torch.arange(size, device=self.index.device)).reshape(-1)

    def restrict(self, full: Tensor) -> Tensor:
        """The live part of `full`, a new tensor without gaps, in the order of `index`."""
        full = full.detach()
        if self.block is not None:
            part = full
            for dim, at in enumerate(self.block):
                part = part if at is None else part.index_select(dim, at.to(full.device))
            return part.clone(memory_format=torch.contiguous_format) if part is full else part.contiguous()
        if self.spans:
            return full.permute(*self.keeps, *self.spans)[self._coordinates()].flatten(1)
        flat, places = self._flat(full)
        if _by_kernel(flat, len(places)):
            values = flat.new_empty(len(places))
            _move(places, values, flat, None)
            return values
        return flat.index_select(0, places)

    @torch.no_grad()
    def prolong(self, values: Tensor, full: Tensor, *, zeros: bool = False) -> None:
        """Write `values` to the live part of `full`, in place; the rest stays, or becomes zero: `zeros=True`."""
        if zeros:
            full.zero_()
        if self.block is not None:
            values = values.detach().to(full)
            if full.dim():
                full[self._grid(full.device)] = values
            else:
                full.copy_(values)
            return
        if self.spans:
            grouped = full.permute(*self.keeps, *self.spans)
            grouped[self._coordinates()] = values.view(-1, *grouped.shape[len(self.keeps) :]).to(full.dtype)
            return
        flat, places = self._flat(full)
        values = values.to(full.dtype)
        if _by_kernel(flat, len(places)) and values.is_contiguous():
            _move(places, values, None, flat)
        else:
            flat.index_copy_(0, places, values)
        if flat.data_ptr() != full.data_ptr():  # a copy, as `full` has gaps
            full.copy_(flat.view(full.shape))

    # ---- where it is

    def _kept(self, device: torch.device | None = None) -> list[Tensor]:
        """Of a block, the kept indices of every dimension."""
        block = (*(self.block or ()), *[None] * len(self.full_shape))
        return [
            torch.arange(size, device=device) if at is None else at.to(device or at.device)
            for size, at in zip(self.full_shape, block, strict=False)
        ]

    def _grid(self, device: torch.device | None = None) -> tuple[Tensor, ...]:
        """Of a block, every index in a dimension of its own: together they name its entries."""
        kept = self._kept(device)
        return tuple(at.view(-1, *[1] * (len(kept) - 1 - i)) for i, at in enumerate(kept))

    def _coordinates(self) -> tuple[Tensor, ...]:
        return torch.unravel_index(self.index, self.kept_shape)

    def _flat(self, full: Tensor) -> tuple[Tensor, Tensor]:
        """`full` as a vector in the order of its memory, and where the live entries are in it."""
        if full.is_contiguous():
            return full.view(-1), self.index
        strides = full.stride()
        if full.numel() == 1 + sum((n - 1) * s for n, s in zip(full.shape, strides, strict=True)):  # no gaps
            if strides not in self._places:
                at = zip(torch.unravel_index(self.index, full.shape), strides, strict=True)
                self._places[strides] = torch.stack([i * stride for i, stride in at]).sum(0)
            return full.as_strided((full.numel(),), (1,)), self._places[strides]
        return full.reshape(-1), self.index


@dataclass(eq=False)
class Piece:
    """A parameter or buffer of a network, what became of it in a smaller one, and which part of it that is.

    Attributes:
        full: the original.
        small: what holds the kept block of it, with a life of its own.
        part: the block.
    """

    full: Tensor
    small: Tensor
    part: Part

    @property
    def index(self) -> Block:
        """Per dimension of `full` the kept indices, None for all."""
        return self.part.block or ()

    def restrict(self, full: Tensor) -> Tensor:
        """The kept part of a weight, a dual, a moment: new, contiguous, of the shape of `small`."""
        return self.part.restrict(full)

    def prolong(self, values: Tensor, full: Tensor, *, zeros: bool = False) -> None:
        """Write `values` to the kept part of `full`, in place; the rest stays, or becomes zero: `zeros=True`."""
        self.part.prolong(values, full, zeros=zeros)


def beyond(weight: Tensor, bound: float = 0.0) -> Tensor:
    """Where |weight| > `bound`, numbered row by row."""
    if not _by_kernel(weight, weight.numel()) or not weight.is_contiguous():
        return (weight.reshape(-1).abs() > bound).nonzero().squeeze(1)
    from .kernels import csr

    counts, index = torch.zeros(-(-weight.numel() // FIND) + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for write in (0, 1):
        if write:
            index = torch.empty(int(counts.cumsum_(0)[-1]), dtype=torch.int64)
        limit = np.array([bound])
        addresses = [*(t.data_ptr() for t in (counts, index, weight)), limit.ctypes.data]
        head = np.array([0, weight.numel(), FIND, *addresses, write], np.int64)
        threads.run(csr.find(DTYPES[weight.dtype]), head.ctypes.data, alone=False)
    return index


def _by_kernel(flat: Tensor, live: int) -> bool:
    """torch's own gather and scatter of a vector run on one thread."""
    return live > MANY and flat.device.type == "cpu" and flat.dtype in DTYPES and kernels.available()


def _move(index: Tensor, values: Tensor, source: Tensor | None, target: Tensor | None) -> None:
    """values[k] = source[index[k]], or target[index[k]] = values[k]."""
    from .kernels import csr

    addresses = [0 if t is None else t.data_ptr() for t in (index, values, source, target)]
    head = np.array([0, len(index), CHUNK, 0, 0, *addresses, 0, 0, 0, 0, 0, 0], np.int64)
    threads.run(csr.move(DTYPES[values.dtype]), head.ctypes.data, alone=False)
