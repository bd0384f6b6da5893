from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..regularizers import Regularizer
from .base import BregmanOptimizer
from .onepass.rule import Rule
from .options import as_float, check_number


class LinBreg(BregmanOptimizer):
    r"""Linearised Bregman iterations, plain and with momentum [J, algorithms 1 and 2].

    .. code-block:: text

        start     v = θ/δ + p,  p ∈ ∂J(θ)
        plain     v ← v − τ g                                      θ ← prox_{δJ}(δv)
        "paper"   m ← β m + (1−β) τ g         v ← v − m            θ ← prox_{δJ}(δv)
        "sgd"     m ← β m + g                 v ← v − τ m          θ ← prox_{δJ}(δv)
        nesterov  m ← β m + g                 v ← v − τ (g + β m)  θ ← prox_{δJ}(δv)

    With `regularizer=None` and δ = 1 it is `torch.optim.SGD`. The paper's momentum averages, so it moves about 1/(1−β)
    times less far than SGD's at the same `lr`.

    Args:
        params: parameters or groups; `tb.param_groups(model, …)` regularises the weights and leaves biases and norms.
        lr: step size τ, a number or a one-element tensor.
        regularizer: what J is, such as `tb.L1()`; a group may bring its own. None is no penalty.
        lam: λ ≥ 0, the strength of J. More λ: weights enter later. A tensor that broadcasts against the weights sets it
            per entry.
        delta: δ > 0 of the elastic net J_δ = J + ‖θ‖²/(2δ).
        momentum: β in [0, 1).
        momentum_rule: "paper" or "sgd".
        nesterov: for `momentum_rule="sgd"`.
        weight_decay: added to the gradient, as in SGD.
        maximize: ascend instead.
        foreach: update all tensors of a group together; None decides as torch does (on CUDA).
        fused: the whole step as one pass over memory, with the extra `fast` on the CPU and Triton on a GPU. None: on a
            GPU if Triton is there; on the CPU once a thousand million entries were updated, when compiling has paid off
            (it is kept on disk). Half precision on the CPU, tensors with gaps and DTensors take the plain step.

    Raises:
        ValueError: an option out of range, or a regulariser that does not fit a parameter's shape.

    [J] Bungert, Roith, Tenbrinck, Burger, A Bregman Learning Framework for Sparse Neural Networks, JMLR 23(192), 2022.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-1,
        *,
        regularizer: Regularizer | None = None,
        lam: float | Tensor = 0.0,
        delta: float = 1.0,
        momentum: float = 0.0,
        momentum_rule: str = "paper",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "lam": lam, "delta": delta, "momentum": momentum, "momentum_rule": momentum_rule,
            "nesterov": nesterov, "weight_decay": weight_decay,
            "maximize": maximize, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, regularizer)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_momentum(group)

    def _descend(
        self, duals: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        lr, beta = as_float(group["lr"]), group["momentum"]
        if beta == 0:
            torch._foreach_add_(duals, grads, alpha=-lr)
        elif group["momentum_rule"] == "paper":
            for state, grad in zip(states, grads, strict=True):
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(grad)
            buffers = [state["momentum"] for state in states]
            torch._foreach_mul_(buffers, beta)
            torch._foreach_add_(buffers, grads, alpha=(1 - beta) * lr)
            torch._foreach_sub_(duals, buffers)
        else:
            torch._foreach_add_(duals, sgd_direction(grads, states, group), alpha=-lr)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return momentum_rule(group)


def momentum_rule(group: dict[str, Any]) -> Rule:
    """The rule of the one-pass step for gradient descent with or without momentum."""
    numbers = {"LR": as_float(group["lr"]), "BETA1": group["momentum"]}
    if group["momentum"] == 0:
        return Rule("PLAIN", numbers=numbers)
    if group.get("momentum_rule", "sgd") == "paper":
        return Rule("PAPER", ("momentum",), numbers)
    return Rule("NESTEROV" if group["nesterov"] else "SGD", ("momentum",), numbers)


def sgd_direction(grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> list[Tensor]:
    """m ← β m + g, with m = g at the first step; m, or with Nesterov g + β m. The rule of torch.optim.SGD."""
    beta, buffers = group["momentum"], []
    for grad, state in zip(grads, states, strict=True):
        if "momentum" in state:
            state["momentum"].mul_(beta).add_(grad)
        else:
            state["momentum"] = grad.clone()
        buffers.append(state["momentum"])
    if not group["nesterov"]:
        return buffers
    return list(torch._foreach_add(grads, buffers, alpha=beta))


def check_momentum(group: dict[str, Any]) -> None:
    """ValueError unless momentum, its rule and nesterov are possible together."""
    check_number("momentum", group["momentum"], high=1.0)
    rule = group.get("momentum_rule", "sgd")
    if rule not in ("paper", "sgd"):
        raise ValueError(f"Invalid `momentum_rule`: {rule!r}; expected 'paper' or 'sgd'.")
    if group["nesterov"] and (group["momentum"] == 0 or rule != "sgd"):
        raise ValueError("Invalid `nesterov`: True; it needs momentum > 0 and momentum_rule='sgd'.")
