"""The optimizer step as one pass over memory on a GPU: what fused.py is for CPUs, one launch for a parameter group.

All numbers come in as a table, so one compilation per rule and dtype, half a second, serves every tensor, lr and λ.
"""

from __future__ import annotations

import functools
import importlib.util
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .fused import Held, dual_dtype, without_gaps

if TYPE_CHECKING:
    from .base import BregmanOptimizer

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def available() -> bool:
    """Whether Triton is installed: with CUDA builds of torch for Linux it is."""
    return importlib.util.find_spec("triton") is not None


def supports(p: Tensor) -> bool:
    """Whether one pass can work on `p`: floating point on a GPU, without gaps."""
    return p.device.type == "cuda" and p.dtype in TYPES and without_gaps(p)


class Plan(Held):
    """What the optimizers see of the one pass over `params`, which may be of several dtypes and devices."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        super().__init__(params, states)
        from ..kernels import gpu

        self.kernel = gpu
        self.columns: dict[str, Any] = {}
        self.asked: Any = None  # the λ and δ that the numbers stand for
        self.pointed: dict[str, list[Tensor]] = {}
        self.sizes, self.strides = [p.numel() for p in params], [p.stride() for p in params]
        self.addresses = [p.data_ptr() for p in params]
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
        """Whether the parameters are laid out as they were; they can only change that by moving."""
        addresses = [p.data_ptr() for p in self.params]
        return addresses == self.addresses or all(
            supports(p) and p.stride() == strides for p, strides in zip(self.params, self.strides, strict=True)
        )

    def set(self, **columns: Any) -> None:
        """Numbers for all tensors, or one per tensor, by the names of the kernel's columns."""
        self.columns |= columns

    def point(self, column: str, tensors: list[Tensor]) -> None:
        """What the kernel finds as V, FIRST or SECOND."""
        self.pointed[column] = tensors

    def gradients(self, check: Any) -> list[Tensor]:
        """The gradients, laid out as the parameters are. `check(p)` refuses those that cannot be used."""
        found: list[Tensor] = []
        for p, strides in zip(self.params, self.strides, strict=True):
            grad = check(p)
            alike = grad.layout is torch.strided and grad.dtype == p.dtype and grad.stride() == strides
            found.append(grad if alike else torch.empty_like(p).copy_(grad))
        return found

    def run(self, rule: str, primal: bool, grads: list[Tensor] | None = None) -> None:
        """One pass: v moves by `rule` and θ follows."""
        kernel, n = self.kernel, len(self.params)
        duals = self.params if primal else self.pointed["V"]
        first, second = self.pointed.get("FIRST", duals), self.pointed.get("SECOND", duals)
        table = np.empty((n, kernel.WIDTH), np.int64)
        self.addresses = [p.data_ptr() for p in self.params]
        table[:, 0], table[:, 1] = self.sizes, self.addresses
        for column, tensors in enumerate((grads or duals, duals, first, second), 2):
            table[:, column] = [t.data_ptr() for t in tensors]
        numbers = table[:, kernel.ADDRESSES :].view(np.float64)
        for column, name in enumerate(kernel.NAMES):
            numbers[:, column] = self.columns.get(name, 1.0)
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


def plan(optimizer: BregmanOptimizer, i: int, params: list[Tensor]) -> Plan | None:
    """The plan for `params` of group i; None where one of them is not supported."""
    ids = list(map(id, params))
    known = optimizer._gpu_plans.get(i)
    if known is None or known[0] != ids or not (known[1] is None or known[1].fits()):
        made = Plan(params, [optimizer.state[p] for p in params]) if all(map(supports, params)) else None
        known = optimizer._gpu_plans[i] = (ids, made)
    return known[1]
