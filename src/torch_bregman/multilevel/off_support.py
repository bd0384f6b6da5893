"""How v moves off the support around a fine step, beyond the step itself.

Off the support v stands still in the coarse phases. There are two ways to let it move further in the fine steps: by a
factor, or by what it has missed, as far as one fine gradient can tell.

[ML] Lunk, Scott, Bungert, Sparse Training of Neural Networks based on Multilevel Mirror Descent, arXiv 2602.03535.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..kernels import DTYPES, threads
from ..optim import BregmanOptimizer
from ..optim.onepass.plan import without_gaps
from ..part import Part
from ..regularizers import Regularizer
from .exchange import Exchanged

FEW = 1 << 16  # entries up to which compiling a kernel is not worth it
INSIDE = 1 - 1e-4  # of the threshold, so that rounding carries no group over it


class OffSupport:
    r"""The further way of v off the support, in two settings.

    .. code-block:: text

        boost c      v ← v⁻ + c (v⁺ − v⁻)             after a fine step that took v from v⁻ to v⁺ [ML]
        catch up     v ← v − m τ s m̂₁ / (√m̂₂ + ε)     before the first fine step after m coarse ones of AdaBreg

    θ follows a boosted v at once. Where v catches up it stays within ∂J(0), so that θ does with the step.

    Args:
        optimizer: whose v is moved.
        catches_up: whether v catches up.
    """

    def __init__(self, optimizer: BregmanOptimizer, *, catches_up: bool) -> None:
        self.optimizer, self.catches_up = optimizer, catches_up
        self._missed: tuple[int, list[Exchanged]] = (
            0,
            [],
        )  # coarse steps of a phase that has just ended, and its parts
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # weight, v and the support, before a step

    def phase_ended(self, steps: int, parts: list[Exchanged]) -> None:
        """A coarse phase of so many steps with these parts has ended, and a fine step comes next."""
        self._missed = (steps, list(parts)) if self.catches_up else (0, [])

    def before_step(self, boost: float, weights: Iterable[tuple[Tensor, Regularizer]]) -> None:
        """Let v catch up; for a boost, note where v is. `weights`: those off whose support v is boosted."""
        steps, parts = self._missed
        self._missed = (0, [])
        for part in parts:
            state, full = self.optimizer.state[part.live.full], part.live.full
            if part.regularizer is not None and full.grad is not None and "exp_avg" in state:
                group = self.optimizer.param_groups[part.group]
                take_missed_steps(full, state, group, part.regularizer, part.live.where, steps)
        self._before = [
            (p, self.optimizer.state[p]["dual"].clone(), reg.coupled(p != 0))
            for p, reg in (weights if boost != 1 else ())
            if p.grad is not None
        ]

    def after_step(self, boost: float) -> None:
        """Take v further, by `boost`."""
        for p, before, support in self._before:
            dual = self.optimizer.state[p]["dual"]
            dual.copy_(torch.where(support, dual, before + boost * (dual - before)))
            self.optimizer.write(p)
        self._before = []


@torch.no_grad()
def take_missed_steps(
    weight: Tensor, state: dict[str, Any], group: dict[str, Any], reg: Regularizer, seen: Part, missed: int
) -> None:
    r"""Before a fine step of AdaBreg: let v move as it would have in the `missed` steps, where the gradients agree.

    .. code-block:: text

        m₂ ← β₂ᵐ m₂ + (1 − β₂ᵐ) g²                       m = missed
        s = ((m̂₁²/m̂₂ − n) / (1 − n))₊, at most 1          n = (1 − β₁)/(1 + β₁)
        v ← v − m τ s · m̂₁ / (√m̂₂ + ε), projected onto ∂J(0)

    m̂₁ and m̂₂ are those that the step will make of g. Of gradients with mean μ and variance σ², m̂₂ is about μ² + σ² and
    m̂₁² about μ² + nσ², so that s is the share μ²/(μ² + σ²) of the signal: where all gradients are alike, v catches up
    with the steps it has missed, and where they are noise, it moves as in any other step. θ stays zero until the step
    itself carries v over the threshold.

    Args:
        weight: with its gradient.
        state, group: of the optimizer, before the step.
        reg: J, whose threshold is the λ of `state`.
        seen: the entries that have been trained in the coarse phase; they stay as they are.
    """
    v, first, second = state["dual"], state["exp_avg"], state["exp_avg_sq"]
    assert weight.grad is not None
    grad = weight.grad.to(v.dtype)
    held = seen.restrict(v), seen.restrict(second)
    (beta1, beta2), k = group["betas"], float(state["step"]) + 1
    noise = (1 - beta1) / (1 + beta1)
    bound = float(state["lam"]) * INSIDE
    between = reg.interval(bound)
    numbers = [
        beta2**missed, beta2, group["eps"], -missed * float(group["lr"]), -1.0 if group["maximize"] else 1.0,
        1 - beta1, 1 / (1 - beta1**k), 1 / (1 - beta2**k), noise, 1 / (1 - noise),
        *(between or (-math.inf, math.inf)),
    ]  # fmt: skip
    tensors: tuple[Tensor, ...] = (v, first, second, grad)
    if all(t.dtype == v.dtype and t.stride() == v.stride() and without_gaps(t) for t in tensors):
        tensors = tuple(t.detach().as_strided((t.numel(),), (1,)) for t in tensors)
        done = _by_kernel(tensors, numbers)
        tensors = tuple(t[done:] for t in tensors)
    if tensors[0].numel():
        _by_equations(tensors, *numbers)
    if between is None:
        v.sub_(reg.prox(v, bound))
    seen.prolong(held[0], v)
    seen.prolong(held[1], second)


def _by_equations(
    tensors: tuple[Tensor, ...], keep: float, beta2: float, eps: float, pace: float, sign: float,
    new: float, unbias1: float, unbias2: float, noise: float, scale: float, low: float, high: float,
) -> None:  # fmt: skip
    v, first, second, grad = tensors
    square = grad.square()
    second.mul_(keep).add_(square, alpha=1 - keep)
    mean = torch.lerp(first, sign * grad, new).mul_(unbias1)
    root = torch.lerp(second, square, 1 - beta2).mul_(unbias2)
    share = mean.square().div_(root).sub_(noise).mul_(scale).clamp_(0, 1).nan_to_num_(0.0)  # 0/0: no gradient
    v.addcdiv_(share.mul_(mean), root.sqrt_().add_(eps), value=pace).clamp_(low, high)


def _by_kernel(tensors: tuple[Tensor, ...], numbers: list[float]) -> int:
    """The same in one pass over memory, for whole cache lines: how many entries have been done."""
    v = tensors[0]
    if v.device.type != "cpu" or v.dtype not in DTYPES or not kernels.available() or v.numel() <= FEW:
        return 0
    from ..kernels import missed as kernel

    name = DTYPES[v.dtype]
    size = v.numel() - v.numel() % kernel.LANES[name]
    given = np.array(numbers, dtype=name)
    head = np.array([0, size, *(t.data_ptr() for t in tensors), given.ctypes.data], np.int64)
    threads.run(kernel.take_missed_steps(name), head.ctypes.data, alone=False)
    torch.autograd.graph.increment_version([tensors[0], tensors[2]])
    return size
