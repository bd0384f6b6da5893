"""A plan: what one call of a loop needs to know about the tensors of a parameter group.

It lives as long as they stay the same. All numbers (lr, λ, δ, …) are read again in every step and handed over as data,
so nothing is ever compiled twice. With a thousand small tensors it is the Python around the loop that costs, hence the
lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...regularizers import Regularizer
from ..options import dual_dtype
from .rule import Rule


def without_gaps(p: Tensor) -> bool:
    """Whether `p` is an ordinary tensor whose entries follow each other in memory, in one order or the other."""
    if type(p.detach()) is not Tensor:
        return False
    return p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))


class Plan:
    """The protocol of both machines, and the state tensors of `params` as they need them."""

    #: Can v move alone, while θ waits for a prox that needs more than one entry?
    moves_dual_alone = False
    #: Can the k-th largest |v| be found in passes over memory?
    finds_kth = False

    def __init__(self, params: list[Tensor], states: list[dict[str, Any]]) -> None:
        self.params, self.states = params, states
        self.strides = [p.stride() for p in params]
        self.asked: Any = None  # the λ and δ that the numbers stand for
        self._buffers: dict[str, list[Tensor]] = {}
        self._counts: tuple[Tensor, list[Tensor]] | None = None

    # ---- what a machine adds

    def fits(self) -> bool:
        """Whether the parameters are laid out as they were; they can only change that by moving."""
        raise NotImplementedError

    def set(self, **numbers: Any) -> None:
        """Numbers for all tensors, or one per tensor, by the names in `kernels.columns.NUMBERS`."""
        raise NotImplementedError

    def point(self, column: str, tensors: list[Tensor]) -> None:
        """Where the loop finds GRAD, V, FIRST or SECOND."""
        raise NotImplementedError

    def gradients(self, check: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The gradients, laid out as the parameters are. `check(p)` refuses those that cannot be used."""
        raise NotImplementedError

    def group_prox(self, p: Tensor, reg: Regularizer | None, group: dict[str, Any], state: dict[str, Any]) -> Any:
        """The plan of the prox on `p` if it shrinks groups that lie in rows; None for every other prox."""
        return None

    def run(self, rule: str, mode: str) -> None:
        """One pass. Where v, gradients and moments are, and all numbers, are in place."""
        raise NotImplementedError

    # ---- what they share

    def take(self, rule: Rule) -> str:
        """Put the numbers and buffers of a step in place; the name of its rule."""
        for column, name in zip(("FIRST", "SECOND"), rule.buffers, strict=False):
            self.point(column, self.buffer(name))
        self.set(**rule.numbers)
        if rule.corrections is not None:
            steps = self._count_up()
            known = {k: rule.corrections(k) for k in set(steps)}
            if len(known) == 1:
                self.set(**known[steps[0]])
            else:
                self.set(**{name: [known[k][name] for k in steps] for name in known[steps[0]]})
        return rule.name

    def buffer(self, name: str) -> list[Tensor]:
        """The state `name` of every parameter, laid out as the parameter is; zeros where there is none yet."""
        found: list[Any] = [state.get(name) for state in self.states]
        known = self._buffers.get(name)
        if known is None or any(map(_is_not, found, known)):
            for i, (p, buffer) in enumerate(zip(self.params, found, strict=True)):
                if buffer is None:
                    if name == "dual":
                        raise KeyError(f"`state` of a parameter of shape {tuple(p.shape)} has no `dual`.")
                    found[i] = torch.zeros_like(p, dtype=dual_dtype(p))
                elif buffer.stride() != p.stride() or buffer.dtype != dual_dtype(p):
                    found[i] = torch.empty_like(p, dtype=dual_dtype(p)).copy_(buffer)
                self.states[i][name] = found[i]
            self._buffers[name] = found
        return found

    def _count_up(self) -> list[float]:
        """k ← k + 1, the number of this step for every tensor: views of one tensor, so that one addition does."""
        found = [state.get("step") for state in self.states]
        if self._counts is None or any(map(_is_not, found, self._counts[1])):
            together = torch.tensor([0.0 if k is None else float(k) for k in found], dtype=torch.float32)
            self._counts = together, list(together.unbind())
            for state, view in zip(self.states, self._counts[1], strict=True):
                state["step"] = view
        self._counts[0].add_(1)
        return self._counts[0].tolist()


def count_up(states: list[dict[str, Any]]) -> list[float]:
    """k ← k + 1 for every tensor. It lives on the CPU, so that nothing waits for the device."""
    for state in states:
        state["step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).cpu() + 1
    return [state["step"].item() for state in states]


def count_without_entries(p: Tensor, state: dict[str, Any], rule: Rule) -> None:
    """A step of a parameter without entries, which no pass sees: a weight of which nothing lives."""
    for name in rule.buffers:
        state.setdefault(name, torch.zeros_like(p, dtype=dual_dtype(p)))
    if rule.corrections is not None:
        count_up([state])


def _is_not(a: Any, b: Any) -> bool:
    return a is not b
