"""The optimizer step as one pass over memory, on the CPU. The equations stand in linbreg.py, adabreg.py and proxsgd.py.

A `Plan` is what one call of the kernel needs to know about the tensors of a parameter group; it lives as long as they
stay the same. All numbers (lr, λ, δ, …) are read again in every step and handed over as data, so nothing is ever
compiled twice. With a thousand small tensors it is the Python around the kernel that costs, hence the lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import DTYPES, LINE_BYTES, threads
from ..regularizers import L1, GroupL1, Regularizer, SparseGroupL1

if TYPE_CHECKING:
    from .base import BregmanOptimizer

SMALL = 1 << 18  # entries up to which all of θ is compared in every step, not only the lines with a live weight
ALONE = 1 << 15  # entries up to which waking a second thread costs more than it brings
#: Entries updated by the readable step after which compiling (a few seconds, at two nanoseconds each) has paid off.
EARNED = 1_000_000_000


def supports(p: Tensor) -> bool:
    """Whether the kernel can work on `p`: float32 or float64 in the memory of this machine, without gaps."""
    return p.device.type == "cpu" and p.dtype in DTYPES and without_gaps(p)


def without_gaps(p: Tensor) -> bool:
    """Whether `p` is an ordinary tensor whose entries follow each other in memory, in one order or the other."""
    if type(p.detach()) is not Tensor:
        return False
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


def dual_dtype(p: Tensor) -> torch.dtype:
    """The precision of v and of all that moves it: float32 or better."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class Held:
    """State tensors of `params`, as one pass over memory needs them."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.params, self.states = params, states
        self.buffers: dict[str, list[Tensor]] = {}
        self.counts: tuple[Tensor, list[Tensor]] | None = None

    def buffer(self, name: str) -> list[Tensor]:
        """The state `name` of every parameter, laid out as the parameter is; zeros where there is none yet."""
        found: list[Any] = [state.get(name) for state in self.states]
        known = self.buffers.get(name)
        if known is None or any(map(_is_not, found, known)):
            for i, (p, buffer) in enumerate(zip(self.params, found, strict=True)):
                if buffer is None:
                    if name == "dual":
                        raise KeyError(f"`state` of a parameter of shape {tuple(p.shape)} has no `dual`.")
                    found[i] = torch.zeros_like(p, dtype=dual_dtype(p))
                elif buffer.stride() != p.stride() or buffer.dtype != dual_dtype(p):
                    found[i] = torch.empty_like(p, dtype=dual_dtype(p)).copy_(buffer)
                self.states[i][name] = found[i]
            self.buffers[name] = found
        return found

    def count_up(self) -> list[float]:
        """k ← k + 1, the number of this step for every tensor: views of one tensor, so that one addition does."""
        found = [state.get("step") for state in self.states]
        if self.counts is None or any(map(_is_not, found, self.counts[1])):
            together = torch.tensor([0.0 if k is None else float(k) for k in found], dtype=torch.float32)
            self.counts = together, list(together.unbind())
            for state, view in zip(self.states, self.counts[1], strict=True):
                state["step"] = view
        self.counts[0].add_(1)
        return self.counts[0].tolist()


class Plan(Held):
    """The kernel's view of `params`, which all have one dtype."""

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        from ..kernels import step

        super().__init__(params, states)
        self.kernel = step
        self.dtype, self.strides = params[0].dtype, [p.stride() for p in params]
        self.jobs = np.zeros((len(params), 9), np.int64)
        self.numbers = np.zeros((len(params), step.COLUMNS))
        size = self.jobs[:, step.SIZE] = [p.numel() for p in params]
        self.starts = np.zeros(len(params) + 1, np.int64)
        self.total = sum(size)
        low, high = step.CHUNKS
        chunk = max(low, min(high, 1 << (self.total // 8).bit_length()))
        np.cumsum(-(-self.jobs[:, step.SIZE] // chunk), out=self.starts[1:])
        self.head = np.zeros(8, np.int64)
        self.head[step.CHUNK], self.head[step.COUNT], self.head[step.TENSORS] = chunk, self.starts[-1], len(params)
        for place, array in ((step.JOBS, self.jobs), (step.NUMBERS, self.numbers), (step.STARTS, self.starts)):
            self.head[place] = array.ctypes.data
        # A byte per cache line of θ, and room to look ahead beyond the last one.
        lines = self.jobs[:, step.SIZE] * params[0].element_size() // LINE_BYTES + 1 + step.AHEAD
        self.live = np.zeros(lines.sum(), np.int8)
        self.jobs[:, step.LIVE] = self.live.ctypes.data + np.cumsum(lines) - lines
        self.small = self.jobs[:, step.SIZE] <= SMALL
        self.versions = [-1] * len(params)
        self.addresses = [p.data_ptr() for p in params]
        self.places = [0] * len(params)  # where θ lay in the last pass
        self.at = self.head.ctypes.data
        self.groups: dict[Tensor, GroupPlan | None] = {}
        self.asked: Any = None  # the λ and δ that the numbers stand for
        self.given: dict[str, Any] = {}

    def fits(self) -> bool:
        """Whether the parameters are laid out as they were; they can only change that by moving."""
        self.addresses = [p.data_ptr() for p in self.params]
        return self.addresses == self.places or [p.stride() for p in self.params] == self.strides

    def set(self, **columns: Any) -> None:
        """Numbers for all tensors, or one per tensor, by the names of the kernel's columns."""
        for name, value in columns.items():
            if type(value) is not float or self.given.get(name) != value:
                self.numbers[:, getattr(self.kernel, name)] = value
                self.given[name] = value if type(value) is float else None

    def point(self, column: str, tensors: list[Tensor]) -> None:
        """Where the kernel finds GRAD, V, FIRST or SECOND."""
        self.jobs[:, getattr(self.kernel, column)] = [t.data_ptr() for t in tensors]

    def gradients(self, check: Any) -> list[Tensor]:
        """The gradients, laid out as the parameters are. `check(p)` refuses those that cannot be used."""
        grads: list[Any] = [p.grad for p in self.params]
        for i, (grad, strides) in enumerate(zip(grads, self.strides, strict=True)):
            if grad.dtype is not self.dtype or grad.layout is not torch.strided or grad.stride() != strides:
                grads[i] = torch.empty_like(self.params[i]).copy_(check(self.params[i]))
        return grads

    def grouped(
        self, p: Tensor, reg: Regularizer | None, group: dict[str, Any], state: dict[str, Any]
    ) -> GroupPlan | None:
        """The plan of the prox on `p` if it shrinks groups that lie in rows; None for every other prox."""
        if not isinstance(reg, GroupL1 | SparseGroupL1):
            return None
        if any(
            isinstance(x, Tensor) and x.numel() != 1 for holds in (group, state) for x in (holds["lam"], holds["delta"])
        ):
            return None
        if p not in self.groups:
            layout = in_memory(reg.groups, p)
            self.groups[p] = None if layout is None else GroupPlan(p, reg, layout)
        return self.groups[p]

    def run(self, rule: str, mode: str) -> None:
        """One pass. Addresses of v, gradients and moments, and all numbers, are in place."""
        step, jobs = self.kernel, self.jobs
        versions, addresses = [p._version for p in self.params], self.addresses
        if versions == self.versions and addresses == self.places and not jobs[:, step.EDITED].any():
            jobs[:, step.LOOK] = self.small
        else:
            known = np.array(versions) == np.array(self.versions)
            known &= (np.array(addresses) == np.array(self.places)) & (jobs[:, step.EDITED] == 0)
            jobs[:, step.LOOK] = self.small | ~known
            jobs[:, step.THETA], jobs[:, step.EDITED] = addresses, 0
            self.places = addresses
        self.head[step.COUNTER] = 0
        self.head[step.PHASE] += 1
        loop = step.step(DTYPES[self.dtype], getattr(step, rule), getattr(step, mode))
        threads.run(loop, self.at, alone=self.total <= ALONE)
        if mode != "DUAL":
            torch.autograd.graph.increment_version(self.params)
            self.versions = [version + 1 for version in versions]


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether λ, δ and the lists of them are equal numbers; tensors can change in place, so they never are."""
    return a == b if all(type(x) is float for x in (*a[:2], *a[2], *a[3])) else False


def _is_not(a: Any, b: Any) -> bool:
    return a is not b


def plans(optimizer: BregmanOptimizer, i: int, params: list[Tensor]) -> list[Plan] | None:
    """The plans for `params` of group i, one per dtype; None where the kernel does not support one of them."""
    ids = list(map(id, params))
    known = optimizer._plans.get(i)
    if known is None or known[0] != ids or not all(plan.fits() for plan in known[1] or ()):
        made = None
        if all(supports(p) for p in params):
            alike = [[p for p in params if p.dtype == dtype and p.numel()] for dtype in DTYPES]
            made = [Plan(some, [optimizer.state[p] for p in some]) for some in alike if some]
        known = optimizer._plans[i] = (ids, made)
    return known[1]


def intervals(reg: Regularizer | None, lam: list[Any], delta: list[Any]) -> tuple[Any, Any, Any] | None:
    """Arrays (low, high, δ) such that θ = δ·(v − clamp(v, low, high)) for every λ and δ.

    None where the prox is not of that kind, or λ or δ are tensors of several entries.
    """
    if not {*map(type, lam), *map(type, delta)} <= {float, int}:
        if any(isinstance(x, Tensor) and x.numel() != 1 for x in (*lam, *delta)):
            return None
        lam, delta = [float(x) for x in lam], [float(x) for x in delta]
    between = (0.0, 0.0) if reg is None else reg.interval(np.array(lam, dtype=float))
    return None if between is None else (*between, np.array(delta, dtype=float))


class GroupPlan:
    """The prox of a group regulariser on one tensor, in the groups' own layout in memory."""

    def __init__(self, p: Tensor, reg: GroupL1 | SparseGroupL1, layout: tuple[int, int, int]) -> None:
        from ..kernels import groups

        self.kernel, self.p, self.name = groups, p, DTYPES[p.dtype]
        outer, self.groups, self.inner = layout
        self.outer = outer
        self.l1_ratio = reg.l1_ratio if isinstance(reg, SparseGroupL1) else 0.0
        self.scale = (p.numel() // self.groups) ** 0.5 if reg.weighted else 1.0
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
        threads.run(loop(self.name), head.ctypes.data, alone=self.p.numel() <= 8 * ALONE)

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


def in_memory(groups: Any, p: Tensor) -> tuple[int, int, int] | None:
    """(outer, count, inner): row r of `inner` entries in memory belongs to group r mod count. None if it is not so."""
    if not isinstance(groups, str) or not p.numel():  # an index tensor: any order
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


def near_kth(optimizer: BregmanOptimizer, duals: dict[int, list[Tensor]], kept: int) -> Tensor | None:
    """The entries of |v|/λ around the `kept`-th largest, and how many are larger than those.

    `duals`: of each parameter group. Returns them as (values, larger) in one tensor of float64, `larger` first; None
    where the fused step does not run, a prox is not plain ℓ1, or too many values are nearly alike.
    """
    rows, dtypes = [], set()
    for i, some in duals.items():
        lam = optimizer.param_groups[i]["lam"]
        plain = type(optimizer.regularizers[i]) is L1 and isinstance(lam, float) and lam > 0
        if not plain or not optimizer._plans.get(i, (None, None))[1]:
            return None
        rows += [(v.numel(), v.data_ptr(), lam) for v in some]
        dtypes |= {v.dtype for v in some}
    if len(dtypes) != 1 or not rows:
        return None
    from ..kernels import select

    sizes, addresses, lam = np.array(rows, dtype=float).T
    name, alone = DTYPES[dtypes.pop()], bool(sizes.sum() <= 32 * ALONE)
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
