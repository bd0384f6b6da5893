"""The prox of group norms on CPUs, where the groups lie in rows of memory: a pass for the norms, and one to shrink."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import DTYPES, LINE_BYTES, threads
from ...regularizers import GroupNorm

SMALL = 1 << 18  # entries up to which all of θ is compared in every step, not only the lines with a live weight
WAKE = 1 << 15  # entries up to which waking a second thread costs more than it brings


class GroupPlan:
    """The prox of a group regulariser on one tensor, in the groups' own layout in memory."""

    def __init__(self, p: Tensor, norm: GroupNorm, layout: tuple[int, int, int]) -> None:
        from ...kernels import groups

        self.kernel, self.p, self.name = groups, p, DTYPES[p.dtype]
        outer, self.groups, self.inner = layout
        self.outer = outer
        self.l1_ratio = norm.l1_ratio
        self.scale = (p.numel() // self.groups) ** 0.5 if norm.weighted else 1.0
        # Chunks do not depend on the number of threads, so that sums come out the same on every machine.
        size = max(1, (1 << 14) // self.inner) if outer == 1 else -(-outer // 64)
        self.factors = np.zeros(self.groups, self.name)
        self.sums = np.zeros((0 if outer == 1 else -(-outer // size), self.groups), self.name)
        self.numbers = np.zeros(3)
        self.known: tuple[int, int] | None = None  # version and address of θ as the last write left it
        self.head = np.zeros(14, np.int64)
        self.listed: np.ndarray = np.zeros(0, np.int64)
        for place, value in (
            (groups.OUTER, outer), (groups.GROUPS, self.groups), (groups.INNER, self.inner), (groups.CHUNK, size),
            (groups.SUMS, self.sums.ctypes.data), (groups.FACTORS, self.factors.ctypes.data),
            (groups.NUMBERS, self.numbers.ctypes.data),
        ):  # fmt: skip
            self.head[place] = value

    def run(self, loop: Any, dual: Tensor, lam: float, delta: float) -> None:
        head, kernel = self.head, self.kernel
        self.numbers[:] = lam * self.l1_ratio, lam * (1 - self.l1_ratio) * self.scale, delta
        head[kernel.COUNTER], head[kernel.V], head[kernel.THETA] = 0, dual.data_ptr(), self.p.data_ptr()
        threads.run(loop(self.name), head.ctypes.data, alone=self.p.numel() <= 8 * WAKE)

    def edited(self, dual: Tensor, lam: float, delta: float) -> bool:
        """Whether θ is not what the last write left."""
        known = self.known == (self.p._version, self.p.data_ptr())
        if self.known is None:
            return True  # someone else wrote θ: compare with the readable prox
        head, kernel = self.head, self.kernel
        head[kernel.EDITED] = 0
        head[kernel.LOOK] = head[kernel.LOOK] + 1 if known and self.p.numel() > SMALL else -1
        self.run(kernel.look, dual, lam, delta)
        return bool(head[kernel.EDITED])

    def write(self, dual: Tensor, lam: float, delta: float, everywhere: bool) -> None:
        """θ ← prox, in every group or only in those that are alive now or were so."""
        if everywhere:
            self.factors[:] = 1  # so that no group counts as dead already
        if self.outer > 1:
            self.run(self.kernel.squares, dual, lam, delta)
            norms = np.sqrt(self.sums.sum(0, dtype=float)).astype(self.name)
            threshold, tiny = self.numbers[self.kernel.SHRINK].astype(self.name), np.finfo(self.name).tiny
            with np.errstate(invalid="ignore"):  # inf/inf is a NaN, as everywhere
                new = np.maximum(norms - threshold, 0) / np.maximum(norms, tiny)
            self.visit((new != 0) | (self.factors != 0))
            self.factors[:] = new
        self.run(self.kernel.shrink, dual, lam, delta)
        if self.outer > 1:
            self.visit(self.factors != 0)  # those that the next look will read
        torch.autograd.graph.increment_version(self.p)
        self.known = self.p._version, self.p.data_ptr()

    def visit(self, groups: np.ndarray) -> None:
        """Tell the kernel which groups to visit, or with rows of one entry, which cache lines hold one (−1)."""
        if self.inner == 1:
            line = LINE_BYTES // self.factors.itemsize
            self.listed = -np.logical_or.reduceat(groups, np.arange(0, self.groups, line)).astype(np.int8)
        else:
            self.listed = np.flatnonzero(groups)
        self.head[self.kernel.LIST], self.head[self.kernel.LISTED] = self.listed.ctypes.data, self.listed.size


def in_memory(groups: str, p: Tensor) -> tuple[int, int, int] | None:
    """(outer, count, inner): row r of `inner` entries in memory belongs to group r mod count. None if it is not so."""
    if not p.numel():
        return None
    n, k = p.shape[0], p.shape[1]
    rest = p.numel() // (n * k)
    if groups == "kernels" and rest == 1:
        return None  # groups of one entry are plain ℓ1, and their factors would be as large as the weight
    if p.is_contiguous():
        return {
            "rows": (1, n, k), "columns": (n, k, 1),
            "filters": (1, n, k * rest), "kernels": (1, n * k, rest), "channels": (n, k, rest),
        }[groups]  # fmt: skip
    return {"filters": (1, n, k * rest), "channels": (n * rest, k, 1)}.get(groups)  # channels_last
