"""Weights that are spread over several processes: DTensors, as `fully_shard` and tensor parallelism make them.

Every rank works on its own part of a weight with the equations of a single process. Where a prox needs more than that,
norms of groups are summed over the ranks that hold the group, and a nuclear norm gathers its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

#: entries of an optimizer's state that are the same on every rank; all others are shaped and cut like the weight
PLAIN = frozenset({"step", "lam", "delta", "written", "waiting"})


def is_sharded(t: Tensor) -> bool:
    """Whether `t` is a DTensor."""
    if type(t) is Tensor or type(t) is Parameter or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # here, for it takes as long to import as everything else together

    return isinstance(t, DTensor)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds, sharing its memory; any other tensor as it is."""
    return t._local_tensor if is_sharded(t) else t  # type: ignore[attr-defined]


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
