"""How a method moves v, as the loops of the one-pass step are told it. Each optimizer describes its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """A rule of `kernels.columns.RULES`, its buffers and its numbers in this step.

    Attributes:
        name: of the rule in the kernels.
        buffers: names of the optimizer's state that the loop knows as FIRST and SECOND.
        numbers: columns that are alike for all tensors.
        corrections: columns that depend on k, the number of this step of a tensor; None: steps are not counted.
    """

    name: str
    buffers: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = {}
    corrections: Callable[[float], Mapping[str, float]] | None = None


HOLD = Rule("HOLD")  # v stands, θ is written
