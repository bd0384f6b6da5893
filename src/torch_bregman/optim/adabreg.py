from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..regularizers import Regularizer
from .base import BregmanOptimizer
from .onepass.plan import count_up
from .onepass.rule import Rule
from .options import as_float, check_number, decoupled_decay


class AdaBreg(BregmanOptimizer):
    r"""Adam on the dual variable: the Bregman version of Adam [J, algorithm 3].

    .. code-block:: text

        start   v = θ/δ + p,  p ∈ ∂J(θ)
        step k  m₁ ← β₁ m₁ + (1−β₁) g          m₂ ← β₂ m₂ + (1−β₂) g²
                v ← v − τ · (m₁ / (1−β₁ᵏ)) / (√(m₂ / (1−β₂ᵏ)) + ε)
                θ ← prox_{δJ}(δv)

    With `regularizer=None` and δ = 1 it is `torch.optim.Adam`, and `AdamW` with decoupled weight decay.

    Args:
        params, lr, regularizer, lam, delta, maximize, foreach, fused: as for `LinBreg`. Every v moves by about `lr` a
            step, so λ is of the order of a hundred times `lr`.
        betas: β₁, β₂ in [0, 1).
        eps: ε. At 1e-8 a weight with a tiny gradient that never changes sign is driven as hard as any other; 1e-4 keeps
            such weights out.
        weight_decay: ω ≥ 0. Added to the gradient as ωθ, where it is divided by √m₂ like all of it: weights with small
            gradients are shrunk the most, down to whole neurons.
        decoupled_weight_decay: v ← v − τωθ before the step instead, the same share of every weight [LH].

    Raises:
        ValueError: an option out of range, or a regulariser that does not fit a parameter's shape.

    [J] Bungert, Roith, Tenbrinck, Burger, A Bregman Learning Framework for Sparse Neural Networks, JMLR 23(192), 2022.
    [LH] Loshchilov, Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        regularizer: Regularizer | None = None,
        lam: float | Tensor = 0.0,
        delta: float = 1.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "lam": lam, "delta": delta,
            "weight_decay": weight_decay, "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize, "foreach": foreach, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults, regularizer)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"])
        try:
            beta1, beta2 = group["betas"]
        except (TypeError, ValueError):
            raise ValueError(f"Invalid `betas`: {group['betas']!r}; expected two numbers in [0, 1).") from None
        check_number("betas[0]", beta1, high=1.0)
        check_number("betas[1]", beta2, high=1.0)

    def _descend(
        self, duals: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        lr, (beta1, beta2), eps = as_float(group["lr"]), group["betas"], group["eps"]
        for state, grad in zip(states, grads, strict=True):
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        root = torch._foreach_sqrt(second)
        steps = count_up(states)
        torch._foreach_div_(root, [(1 - beta2**k) ** 0.5 for k in steps])
        torch._foreach_add_(root, eps)
        torch._foreach_addcdiv_(duals, first, root, [-(lr / (1 - beta1**k)) for k in steps])

    def _rule(self, group: dict[str, Any]) -> Rule:
        lr, (beta1, beta2), decoupled = as_float(group["lr"]), group["betas"], decoupled_decay(group)

        def corrections(k: float) -> dict[str, float]:
            return {"ROOT": (1 - beta2**k) ** 0.5, "PACE": -(lr / (1 - beta1**k))}

        numbers = {"BETA1": beta1, "BETA2": beta2, "EPS": group["eps"], "SHRINK": decoupled}
        return Rule("ADAMW" if decoupled else "ADAM", ("exp_avg", "exp_avg_sq"), numbers, corrections)
