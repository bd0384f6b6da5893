"""The pass over memory on CPUs. The equations stand in linbreg.py, adabreg.py and proxsgd.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels import DTYPES, LINE_BYTES, columns, threads
from ...regularizers import Regularizer
from .groups import SMALL, WAKE, GroupPlan, in_memory
from .plan import Plan, without_gaps


def supports(p: Tensor) -> bool:
    """Whether the loop can work on `p`: float32 or float64 in the memory of this machine, without gaps."""
    return p.device.type == "cpu" and p.dtype in DTYPES and without_gaps(p)


class CpuPlan(Plan):
    """The loop's view of `params`, which all have one dtype."""

    moves_dual_alone = finds_kth = True

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        from ...kernels import step

        super().__init__(params, states)
        self.kernel = step
        self.dtype = params[0].dtype
        self.jobs = np.zeros((len(params), step.JOB), np.int64)
        self.numbers = np.zeros((len(params), step.COLUMNS))
        size = self.jobs[:, columns.SIZE] = [p.numel() for p in params]
        self.starts = np.zeros(len(params) + 1, np.int64)
        self.total = sum(size)
        low, high = step.CHUNKS
        chunk = max(low, min(high, 1 << (self.total // 8).bit_length()))
        np.cumsum(-(-self.jobs[:, columns.SIZE] // chunk), out=self.starts[1:])
        self.head = np.zeros(8, np.int64)
        self.head[step.CHUNK], self.head[step.COUNT], self.head[step.TENSORS] = chunk, self.starts[-1], len(params)
        for place, array in ((step.JOBS, self.jobs), (step.TABLE, self.numbers), (step.STARTS, self.starts)):
            self.head[place] = array.ctypes.data
        # A byte per cache line of θ, and room to look ahead beyond the last one.
        lines = self.jobs[:, columns.SIZE] * params[0].element_size() // LINE_BYTES + 1 + step.AHEAD
        self.live = np.zeros(lines.sum(), np.int8)
        self.jobs[:, step.LIVE] = self.live.ctypes.data + np.cumsum(lines) - lines
        self.small = self.jobs[:, columns.SIZE] <= SMALL
        self.versions = [-1] * len(params)
        self.addresses = [p.data_ptr() for p in params]
        self.places = [0] * len(params)  # where θ lay in the last pass
        self.at = self.head.ctypes.data
        self.groups: dict[Tensor, GroupPlan | None] = {}
        self.given: dict[str, Any] = {}

    def fits(self) -> bool:
        self.addresses = [p.data_ptr() for p in self.params]
        return self.addresses == self.places or [p.stride() for p in self.params] == self.strides

    def set(self, **numbers: Any) -> None:
        for name, value in numbers.items():
            if type(value) is not float or self.given.get(name) != value:
                self.numbers[:, getattr(columns, name)] = value
                self.given[name] = value if type(value) is float else None

    def point(self, column: str, tensors: list[Tensor]) -> None:
        self.jobs[:, getattr(columns, column)] = [t.data_ptr() for t in tensors]

    def gradients(self, check: Callable[[Tensor], Tensor]) -> list[Tensor]:
        grads: list[Any] = [p.grad for p in self.params]
        for i, (grad, strides) in enumerate(zip(grads, self.strides, strict=True)):
            if grad.dtype is not self.dtype or grad.layout is not torch.strided or grad.stride() != strides:
                grads[i] = torch.empty_like(self.params[i]).copy_(check(self.params[i]))
        return grads

    def group_prox(
        self, p: Tensor, reg: Regularizer | None, group: dict[str, Any], state: dict[str, Any]
    ) -> GroupPlan | None:
        if p not in self.groups:
            norm = None if reg is None else reg.group_norm()
            layout = None if norm is None else in_memory(norm.groups, p)
            self.groups[p] = None if norm is None or layout is None else GroupPlan(p, norm, layout)
        if any(
            isinstance(x, Tensor) and x.numel() != 1 for holds in (group, state) for x in (holds["lam"], holds["delta"])
        ):
            return None
        return self.groups[p]

    def run(self, rule: str, mode: str) -> None:
        step, jobs = self.kernel, self.jobs
        versions, addresses = [p._version for p in self.params], self.addresses
        if versions == self.versions and addresses == self.places and not jobs[:, step.EDITED].any():
            jobs[:, step.LOOK] = self.small
        else:
            known = np.array(versions) == np.array(self.versions)
            known &= (np.array(addresses) == np.array(self.places)) & (jobs[:, step.EDITED] == 0)
            jobs[:, step.LOOK] = self.small | ~known
            jobs[:, columns.THETA], jobs[:, step.EDITED] = addresses, 0
            self.places = addresses
        self.head[step.COUNTER] = 0
        self.head[step.PHASE] += 1
        loop = step.step(DTYPES[self.dtype], getattr(columns, rule), getattr(columns, mode))
        threads.run(loop, self.at, alone=self.total <= WAKE)
        if mode != "DUAL":
            torch.autograd.graph.increment_version(self.params)
            self.versions = [version + 1 for version in versions]


def plans(params: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> list[Plan]:
    """A plan for all parameters of each dtype, but those without entries."""
    alike = [[p for p in params if p.dtype == dtype and p.numel()] for dtype in DTYPES]
    return [CpuPlan(some, [state[p] for p in some]) for some in alike if some]
