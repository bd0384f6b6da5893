"""The k-th largest |v|/λ in passes over memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import DTYPES, threads
from .onepass.groups import WAKE
from .regularized import RegularizedOptimizer


def near_kth(optimizer: RegularizedOptimizer, duals: dict[int, list[Tensor]], kept: int) -> Tensor | None:
    """The entries of |v|/λ around the `kept`-th largest, and how many are larger than those.

    `duals`: of each parameter group. Returns them as (values, larger) in one tensor of float64, `larger` first; None
    where the fused step does not run, a prox is not plain ℓ1, or too many values are nearly alike.
    """
    rows, dtypes = [], set()
    for i, some in duals.items():
        lam = optimizer.param_groups[i]["lam"]
        reg = optimizer.regularizers[i]
        plain = reg is not None and reg.by_magnitude and isinstance(lam, float) and lam > 0
        if not plain or not optimizer.plans.have_kth(i):
            return None
        rows += [(v.numel(), v.data_ptr(), lam) for v in some]
        dtypes |= {v.dtype for v in some}
    if len(dtypes) != 1 or not rows:
        return None
    from ..kernels import select

    sizes, addresses, lam = np.array(rows, dtype=float).T
    name, alone = DTYPES[dtypes.pop()], bool(sizes.sum() <= 32 * WAKE)
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(-(-sizes.astype(np.int64) // select.CHUNK), out=starts[1:])

    def run(loop: Any, jobs: Any, near: Any, above: Any) -> int:
        found = np.zeros(1, np.int64)
        head = np.array(
            [0, starts[-1], len(rows), *(x.ctypes.data for x in (jobs, starts, near)), near.size]
            + [x.ctypes.data for x in (found, above)]
        )
        threads.run(loop, head.ctypes.data, alone=alone)
        return int(found[0])

    above = np.zeros(starts[-1], np.int64)
    slots = np.zeros((torch.get_num_threads(), select.SLOTS), np.int64)
    run(select.histogram(name), np.stack([sizes, addresses, lam, lam, lam], 1), slots, above)
    at_least = slots.sum(0)[::-1].cumsum()[::-1]  # how many lie in a slot or above it
    inside = np.flatnonzero(at_least > kept)
    if not len(inside):
        return None
    # A slot, and the ends of its neighbours: the one below may hold the next value, and rounding was rougher here.
    edges = (np.array([max(inside[-1] - 1, 0), inside[-1] + 2]).astype(np.int32) << select.SHIFT).view(np.float32)
    low, high = edges.astype(float)
    jobs = np.stack([sizes, addresses, lam * low, lam * high, lam], 1)
    near = np.empty(max(1024, int(sizes.sum() / 5)))
    n = run(select.band(name), jobs, near, above)
    larger = int(above.sum())
    if n > near.size or not larger < kept < larger + n:
        return None
    return torch.from_numpy(np.concatenate([[larger], near[:n]]))
