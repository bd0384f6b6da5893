"""Supports S = {θ ≠ 0} as unions of groups, and the two operations between the full space and the live part."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..kernels import DTYPES, threads
from ..regularizers import Grouped, Regularizer, group_dims

MANY = 1 << 16  # live entries from which a kernel moves them
CHUNK = 1 << 13
FIND = 1 << 16


class Support:
    """The live groups of a weight W; a group spans the dimensions `spans` of W, without any it is a single entry.

    `restrict(W)` takes the live part as a tensor [live], or [live, size of a group]; `prolong(values, W)` writes it
    back in place. Both work for all that is shaped like W: its dual, a moment.

    Args:
        weight: W; a group is alive if one of its entries is not zero.
        spans: the dimensions of a group.
        index: the live groups, numbered row by row over the other dimensions, instead of those that `weight` shows.
    """

    def __init__(self, weight: Tensor, spans: tuple[int, ...] = (), index: Tensor | None = None) -> None:
        self.full_shape, self.spans = weight.shape, spans
        self.keeps = tuple(d for d in range(weight.dim()) if d not in spans)
        self.kept_shape = tuple(weight.shape[d] for d in self.keeps)
        if index is None:
            index = (
                beyond(weight.detach()) if not spans else (weight.detach() != 0).any(dim=spans).reshape(-1).nonzero()
            )
            index = index.reshape(-1)
        self.index = index.to(weight.device, torch.int64)
        self._places: dict[tuple[int, ...], Tensor] = {}

    def __len__(self) -> int:
        return len(self.index)

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
        return (
            self.index
            if size == 1
            else (self.index[:, None] * size + torch.arange(size, device=self.index.device)).reshape(-1)
        )

    def restrict(self, full: Tensor) -> Tensor:
        """The live part of `full`, a new tensor, in the order of `index`."""
        full = full.detach()
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
        """Write `values` to the live part of `full`, in place; the rest stays, or becomes zero."""
        if zeros:
            full.zero_()
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


def beyond(weight: Tensor, bound: float = 0.0) -> Tensor:
    """Where |weight| > `bound`, numbered row by row."""
    if not _by_kernel(weight, weight.numel()) or not weight.is_contiguous():
        return (weight.reshape(-1).abs() > bound).nonzero().squeeze(1)
    from ..kernels import csr

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
    from ..kernels import csr

    addresses = [0 if t is None else t.data_ptr() for t in (index, values, source, target)]
    head = np.array([0, len(index), CHUNK, 0, 0, *addresses, 0, 0, 0, 0, 0, 0], np.int64)
    threads.run(csr.move(DTYPES[values.dtype]), head.ctypes.data, alone=False)


def support(weight: Tensor, regularizer: Regularizer | None, index: Tensor | None = None) -> Support:
    """The support of `weight` in the groups of a separable regulariser, or of its single entries."""
    spans: tuple[int, ...] = ()
    if isinstance(regularizer, Grouped):
        assert isinstance(regularizer.groups, str)
        spans = group_dims(regularizer.groups, weight.shape)
    return Support(weight, spans, index)


def separable(regularizer: Regularizer) -> bool:
    """Whether J is a sum over entries, or over groups that have a name."""
    return isinstance(regularizer.groups, str) if isinstance(regularizer, Grouped) else elementwise(regularizer)


def elementwise(regularizer: Regularizer) -> bool:
    """Whether every entry is a group of its own."""
    if isinstance(regularizer, Grouped):
        return False
    probe = torch.tensor([[True, False], [False, False]])
    return bool(torch.equal(regularizer.coupled(probe), probe))


def restricted_regularizer(regularizer: Regularizer | None) -> Regularizer | None:
    """The same J on what `Support.restrict` returns: its groups are rows there."""
    return replace(regularizer, groups="rows") if isinstance(regularizer, Grouped) else regularizer
