from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..regularizers import Regularizer
from .held import local_state, store
from .linbreg import check_momentum, momentum_rule, sgd_direction
from .onepass.plan import Plan
from .onepass.prox import intervals
from .onepass.rule import Rule
from .options import as_float
from .regularized import RegularizedOptimizer


class ProxSGD(RegularizedOptimizer):
    r"""Proximal gradient descent, the baseline: θ ← prox_{τJ}(θ − τ d), with d the direction of torch.optim.SGD.

    Unlike LinBreg it keeps no dual: a weight at zero forgets its gradients, and every live weight is shrunk by τλ in
    every step.

    Args:
        params, lr, regularizer, lam, weight_decay, maximize, foreach, fused: as for `LinBreg`.
        momentum, nesterov: as for `torch.optim.SGD`.
    """

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

    def _update(
        self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any], reg: Regularizer | None
    ) -> None:
        lr = as_float(group["lr"])
        if group["momentum"] != 0:
            states = [local_state(p, self.state) for p in params]
            grads = sgd_direction(grads, states, group)
            store(params, states, self.state)
        parts = [self.local(p, reg) for p in params]
        weights = torch._foreach_add([p.to(g.dtype) for (p, _), g in zip(parts, grads, strict=True)], grads, alpha=-lr)
        for (p, on_p), weight in zip(parts, weights, strict=True):
            p.copy_(weight if on_p is None else on_p.prox(weight, lr * group["lam"]))

    def _rule(self, group: dict[str, Any]) -> Rule:
        return momentum_rule(group)

    def _one_pass(self, i: int, params: list[Tensor], group: dict[str, Any], reg: Regularizer | None) -> bool:
        # A prox that needs more than one entry at a time takes the plain step.
        return _interval(group, reg) is not None and super()._one_pass(i, params, group, reg)

    def _set_prox(self, plan: Plan, group: dict[str, Any], reg: Regularizer | None) -> bool:
        low, high, _ = _interval(group, reg) or (0.0, 0.0, 1.0)
        plan.set(DECAY=group["weight_decay"], SIGN=-1.0 if group["maximize"] else 1.0, LOW=low, HIGH=high)
        return True

    def _pass(self, plan: Plan, rule: str, prox: bool, group: dict[str, Any], reg: Regularizer | None) -> None:
        plan.run(rule, "PRIMAL")


def _interval(group: dict[str, Any], reg: Regularizer | None) -> tuple[Any, Any, Any] | None:
    """The prox of a step as numbers, if it has such."""
    return intervals(reg, [as_float(group["lr"]) * group["lam"]], [1.0])
