from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..regularizers import Regularizer
from . import gpu
from .base import BregmanOptimizer, as_float
from .fused import Plan, intervals
from .linbreg import arm, check_momentum, sgd_direction


class ProxSGD(BregmanOptimizer):
    r"""Proximal gradient descent, the baseline: θ ← prox_{τJ}(θ − τ d), with d the direction of torch.optim.SGD.

    Unlike LinBreg it keeps no dual: a weight at zero forgets its gradients, and every live weight is shrunk by τλ in
    every step.

    Args:
        params, lr, regularizer, lam, weight_decay, maximize, foreach, fused: as for `LinBreg`.
        momentum, nesterov: as for `torch.optim.SGD`.
    """

    has_dual = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-1,
        *,
        regularizer: Regularizer | None = None,
        lam: float | Tensor = 0.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "lam": lam, "delta": 1.0, "momentum": momentum, "nesterov": nesterov,
            "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, regularizer)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_momentum(group)

    def _start(self) -> None:
        """θ is the whole state, so there is nothing to create and a dense start does no harm."""

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        lr = as_float(group["lr"])
        if group["momentum"] != 0:
            states = [self._own(p, reg)[1] for p in params]
            grads = sgd_direction(grads, states, group)
            self._keep(params, states)
        parts = [self._part(p, reg) for p in params]
        weights = torch._foreach_add([p.to(g.dtype) for (p, _), g in zip(parts, grads, strict=True)], grads, alpha=-lr)
        for (p, on_p), weight in zip(parts, weights, strict=True):
            p.copy_(weight if on_p is None else on_p.prox(weight, lr * group["lam"]))

    def _arm(self, plan: Plan | gpu.Plan, group: dict[str, Any]) -> str:
        return arm(plan, group)

    def _fused(self, i: int, params: list[Tensor], group: dict[str, Any], reg: Regularizer | None) -> bool:
        # A prox that needs more than one entry at a time takes the plain step.
        return self._interval(group, reg) is not None and super()._fused(i, params, group, reg)

    def _interval(self, group: dict[str, Any], reg: Regularizer | None) -> tuple[Any, Any, Any] | None:
        return intervals(reg, [as_float(group["lr"]) * group["lam"]], [1.0])

    def _elementwise(self, plan: Plan | gpu.Plan, group: dict[str, Any], reg: Regularizer | None) -> bool:
        plan.set(DECAY=group["weight_decay"], SIGN=-1.0 if group["maximize"] else 1.0)
        between = self._interval(group, reg)
        if between is not None:
            plan.set(LOW=between[0], HIGH=between[1])
        return between is not None

    def _remember_all(self, states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        """θ does not depend on the λ of the last step."""

    def _pass(self, plan: Plan, rule: str, group: dict[str, Any], reg: Regularizer | None) -> None:
        self._elementwise(plan, group, reg)
        plan.run(rule, "PRIMAL")

    def refresh(self, groups: Iterable[int] | None = None) -> None:
        """Nothing to do: θ does not depend on λ."""
