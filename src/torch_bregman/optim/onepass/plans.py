"""Which machine passes over which tensors, and the plans that are known already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import kernels
from ..protocols import Levels
from . import cpu, gpu
from .plan import Plan

#: Entries updated by the readable step after which compiling (a few seconds, at two nanoseconds each) has paid off.
EARNED = 1_000_000_000


class Plans:
    """The plans of each parameter group, by its number."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[int], list[Plan] | None]] = {}

    def of(self, i: int, params: list[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> list[Plan] | None:
        """The plans for `params` of group i; None where no machine supports all of them."""
        ids = list(map(id, params))
        known = self._known.get(i)
        if known is None or known[0] != ids or not all(plan.fits() for plan in known[1] or ()):
            made: list[Plan] | None = None
            if params and all(map(gpu.supports, params)):
                made = [gpu.GpuPlan(params, [state[p] for p in params])]
            elif all(map(cpu.supports, params)):
                made = cpu.plans(params, state)
            known = self._known[i] = (ids, made)
        return known[1]

    def ready(self, i: int, params: list[Tensor]) -> bool:
        """Whether there are plans for so many parameters of group i."""
        known = self._known.get(i)
        return known is not None and bool(known[1]) and len(known[0]) == len(params)

    def have_kth(self, i: int) -> bool:
        """Whether the k-th largest |v| of group i can be found in passes over memory."""
        known = self._known.get(i)
        return known is not None and bool(known[1]) and all(plan.finds_kth for plan in known[1] or ())


def require(p: Tensor) -> None:
    """ImportError naming what is to be installed, unless a pass over `p` can be compiled."""
    if p.device.type == "cpu":
        kernels.require("`fused=True` on the CPU")
    if p.device.type == "cuda" and not gpu.available():
        raise ImportError("`fused=True` on a GPU needs Triton: pip install triton.")


def wanted(group: dict[str, Any], params: list[Tensor], levels: Levels | None) -> bool:
    """What was asked for, or else one pass: on the CPU once the work done would have paid for compiling it.

    The count is part of `param_groups`, so that a resumed run switches at the same step. Where `levels` have sparse
    layers, kernels are in use anyway.
    """
    if group["fused"] is not None or group["foreach"] is not None:
        return bool(group["fused"])
    if not params or torch.compiler.is_compiling():
        return False
    if params[0].device.type == "cuda":
        return gpu.available()
    if params[0].device.type != "cpu" or not kernels.available():
        return False
    if group["entries_updated"] >= EARNED or (levels is not None and levels.sparse):
        return True
    group["entries_updated"] += sum(p.numel() for p in params)
    return False
