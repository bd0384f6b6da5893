"""Weights that are spread over several processes: DTensors, as `fully_shard` and tensor parallelism make them.

Every rank works on its own part of a weight with the equations of a single process. Where a prox needs more than that,
norms of groups are summed over the ranks that hold the group, and a nuclear norm gathers its weight.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: entries of an optimizer's state that are the same on every rank; all others are shaped and cut like the weight
PLAIN = frozenset({"step", "lam", "delta", "written", "waiting"})


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is a DTensor."""
    if type(t) is Tensor or type(t) is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # takes as long to import as all the rest of torch
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, sharing its memory; any other tensor as it is."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


def whole(t: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """`of(t)`, entry by entry, on every rank also where `t` is a DTensor."""
    return Shards.of(t).whole(of(local(t))) if is_sharded(t) else of(t)


def require_whole(model: Module, what: str) -> None:
    """ValueError, saying that `what` needs whole weights, where `model` has DTensors or is flattened into shards."""
    module = sys.modules.get("torch.distributed.fsdp")
    flat = module is not None and any(isinstance(m, module.FullyShardedDataParallel) for m in model.modules())
    if flat or any(is_sharded(p) for p in model.parameters()):
        found = "FullyShardedDataParallel" if flat else "DTensors"
        raise ValueError(
            f"`model` has {found}, and {what} needs whole weights: on every rank call get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint.state_dict, and load what "
            "it returns into a model that is not sharded."
        )


def assign(t: Tensor, values: Tensor) -> None:
    """`t.copy_(values)`, where every rank has all the values and a DTensor takes its part of them."""
    local(t).copy_(Shards.of(t).part(values) if is_sharded(t) else values)


@dataclass(frozen=True)
class Shards:
    """How a weight is cut: this rank's part, the whole, and sums over the ranks that hold what belongs together."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    #: the dimensions of the mesh that sums run over
    across: tuple[int, ...]

    @classmethod
    def of(cls, t: Tensor) -> Shards:
        """Those of the DTensor `t`, with sums over all its parts.

        Raises ValueError where its entries are sums still to be taken (`Partial`).
        """
        placements = t.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(f"A parameter has placements {placements}; expected Shard or Replicate.")
        shards = cls(t.device_mesh, placements, t.shape, t.stride(), ())  # type: ignore[attr-defined]
        return shards.cutting(range(t.dim()))

    def cutting(self, dims: Any) -> Shards:
        """The same with sums over the parts that share the dimensions `dims` of the weight."""
        # _StridedShard is not a Shard; both have the dimension they cut.
        across = tuple(i for i, cut in enumerate(self.placements) if getattr(cut, "dim", None) in dims)
        return Shards(self.mesh, self.placements, self.shape, self.stride, across)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in place and the same bits on all of them."""
        return self._reduce(x, torch.distributed.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        """The largest of every rank's `x`, in place."""
        return self._reduce(x, torch.distributed.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        if x.numel():
            for i in self.across:
                torch.distributed.all_reduce(x, op, group=self.mesh.get_group(i))
        return x

    def wrap(self, part: Tensor) -> DTensor:
        """The DTensor of which every rank holds its `part`."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def whole(self, part: Tensor) -> Tensor:
        """All parts together, on every rank."""
        return self.wrap(part).full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that every rank holds."""
        from torch.distributed.tensor import DTensor, Replicate

        everywhere = DTensor.from_local(whole, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return everywhere.redistribute(placements=self.placements)._local_tensor


def _together(tensors: Sequence[Tensor]) -> list[tuple[Shards | None, list[int]]]:
    """Which tensors can share a sum over ranks: how they are cut (None: not at all), and their numbers."""
    found: dict[Any, tuple[Shards | None, list[int]]] = {}
    for i, t in enumerate(tensors):
        shards = Shards.of(t) if is_sharded(t) else None
        key = None if shards is None else (shards.mesh, shards.across)
        found.setdefault(key, (shards, []))[1].append(i)
    return list(found.values())


def sum_over_parts(counts: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sums over all ranks of `counts`, where entry i was counted in this rank's part of tensor i; in place."""
    for shards, numbers in _together(tensors):
        if shards is not None:
            counts[numbers] = shards.sum(counts[numbers])
    return counts


class Spread:
    """Values ≥ 0 of which every rank holds those of its parts of some tensors. All answers are the same on all ranks.

    `values`: of the entries of this rank's part of each of the `tensors`, flat.
    """

    def __init__(self, values: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        self.dtype = functools.reduce(torch.promote_types, [v.dtype for v in values])
        self.size = sum(t.numel() for t in tensors)
        self._held = [
            # Without the sign of −0 or of a NaN, for the bits are compared.
            (shards, torch.cat([values[i].to(self.dtype) for i in numbers]).abs())
            for shards, numbers in _together(tensors)
        ]

    def kth_largest(self, k: int) -> tuple[float, int, int]:
        """The k-th largest value, exactly; how many are larger, and how many are equal to it."""
        # Such floats sort as their bits do, so that counting finds 16 bits of the answer at a time.
        size, found, larger, equal = self.dtype.itemsize, 0, 0, 0
        integer = {4: torch.int32, 8: torch.int64}[size]
        bits = [(shards, values.view(integer)) for shards, values in self._held]
        for shift in range(8 * size - 16, -1, -16):
            slots = [(b >> shift) & 0xFFFF for _, b in bits]
            counts = torch.zeros(1 << 16, dtype=torch.int64)
            for (shards, _), slot in zip(bits, slots, strict=True):
                here = torch.bincount(slot, minlength=1 << 16)
                counts += (here if shards is None else shards.sum(here)).cpu()
            at_least = counts.flip(0).cumsum(0).flip(0)
            at = int((at_least >= k - larger).sum()) - 1
            equal = int(counts[at])
            larger += int(at_least[at]) - equal
            found = found << 16 | at
            bits = [(shards, b[slot == at]) for (shards, b), slot in zip(bits, slots, strict=True)]
        return torch.tensor(found, dtype=integer).view(self.dtype).item(), larger, equal

    def largest_below(self, bound: float) -> float:
        """The largest value < bound; −∞ where there is none."""
        found = []
        for shards, values in self._held:
            rest = values[values < bound]
            here = rest.max() if rest.numel() else values.new_tensor(-math.inf)
            found.append(float(here if shards is None else shards.max(here)))
        return max(found)

    def smallest_above(self, bound: float) -> float:
        """The smallest value > bound; +∞ where there is none."""
        found = []
        for shards, values in self._held:
            rest = values[values > bound]
            here = -rest.min() if rest.numel() else values.new_tensor(-math.inf)
            found.append(-float(here if shards is None else shards.max(here)))
        return min(found)


def count_nonzero(tensors: list[Tensor]) -> list[int]:
    """The number of exact non-zeros of each tensor, counted where they live, fetched in one go.

    DTensors count as a whole, on every rank.
    """
    if not tensors:
        return []
    device = tensors[0].device
    counts = torch.stack([torch.count_nonzero(local(t)).to(device) for t in tensors])
    return sum_over_parts(counts, tensors).tolist()
