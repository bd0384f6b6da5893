"""The pass over memory on GPUs, one launch for a parameter group.

All numbers come in as a table, so one compilation per rule and dtype, half a second, serves every tensor, lr and λ.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import columns
from ..options import dual_dtype
from .plan import Plan, without_gaps

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def available() -> bool:
    """Whether Triton is installed: with CUDA builds of torch for Linux it is."""
    return importlib.util.find_spec("triton") is not None


def supports(p: Tensor) -> bool:
    """Whether one pass can work on `p`: floating point on a GPU, without gaps."""
    return p.device.type == "cuda" and p.dtype in TYPES and without_gaps(p)


class GpuPlan(Plan):
    """The launches over `params`, which may be of several dtypes and devices."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        super().__init__(params, states)
        from ...kernels import gpu

        self.kernel = gpu
        self.numbers: dict[str, Any] = {}
        self.pointed: dict[str, list[Tensor]] = {}
        self.sizes, self.addresses = [p.numel() for p in params], [p.data_ptr() for p in params]
        alike: dict[Any, list[int]] = {}
        for i, p in enumerate(params):
            if self.sizes[i]:
                alike.setdefault((p.dtype, p.device), []).append(i)
        self.launches = [(np.array(rows), self._blocks(rows)) for rows in alike.values()]

    def _blocks(self, rows: list[int]) -> Tensor:
        """[programs, 2]: the place of a tensor in `rows`, and which block of it."""
        counts = [-(-self.sizes[i] // self.kernel.BLOCK) for i in rows]
        places = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
        return torch.from_numpy(np.stack([places, within], 1)).to(self.params[rows[0]].device)

    def fits(self) -> bool:
        addresses = [p.data_ptr() for p in self.params]
        return addresses == self.addresses or all(
            supports(p) and p.stride() == strides for p, strides in zip(self.params, self.strides, strict=True)
        )

    def set(self, **numbers: Any) -> None:
        self.numbers |= numbers

    def point(self, column: str, tensors: list[Tensor]) -> None:
        self.pointed[column] = tensors

    def gradients(self, check: Callable[[Tensor], Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for p, strides in zip(self.params, self.strides, strict=True):
            grad = check(p)
            alike = grad.layout is torch.strided and grad.dtype == p.dtype and grad.stride() == strides
            found.append(grad if alike else torch.empty_like(p).copy_(grad))
        return found

    def run(self, rule: str, mode: str) -> None:
        kernel, primal = self.kernel, mode == "PRIMAL"
        duals = self.params if primal else self.pointed["V"]
        grads = self.pointed.pop("GRAD", duals)  # not kept alive beyond the step
        moments = [self.pointed.get(name, duals) for name in ("FIRST", "SECOND")]
        self.addresses = [p.data_ptr() for p in self.params]
        table = np.empty((len(self.params), kernel.WIDTH), np.int64)
        table[:, columns.SIZE], table[:, columns.THETA] = self.sizes, self.addresses
        for column, tensors in enumerate((grads, duals, *moments), columns.GRAD):
            table[:, column] = [t.data_ptr() for t in tensors]
        numbers = table[:, len(columns.ADDRESSES) :].view(np.float64)
        for column, name in enumerate(columns.NUMBERS):
            numbers[:, column] = self.numbers.get(name, 1.0)
        for rows, blocks in self.launches:
            p = self.params[rows[0]]
            dual = dual_dtype(p)
            # One copy for all numbers of the step.
            on_device = torch.from_numpy(table[rows]).to(p.device, non_blocking=True)
            with torch.cuda.device(p.device) if p.is_cuda else nullcontext():
                kernel.step[(len(blocks),)](
                    on_device, blocks, rule, primal, kernel.TYPES[p.dtype], kernel.TYPES[dual],
                    1 - 4 * torch.finfo(dual).eps,
                )  # fmt: skip
        torch.autograd.graph.increment_version(self.params)
