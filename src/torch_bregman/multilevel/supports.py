"""Which weights can be restricted, and to what: their supports, and the entries that may soon come to life."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..optim import BregmanOptimizer
from ..part import Part, beyond
from ..regularizers import Regularizer
from .live import part_of


class Candidate(NamedTuple):
    """A weight that can be restricted, and where it stands in the optimizer's `param_groups`."""

    group: int
    place: int
    weight: nn.Parameter
    regularizer: Regularizer


def candidates(optimizer: BregmanOptimizer) -> list[Candidate]:
    """The weights whose live units can be trained alone."""
    found = []
    for i, (group, reg) in enumerate(zip(optimizer.param_groups, optimizer.regularizers, strict=True)):
        single = all(not isinstance(group[name], Tensor) or group[name].numel() == 1 for name in ("lam", "delta"))
        ready = [p for p in group["params"] if p.requires_grad and "dual" in optimizer.state.get(p, {})]
        # In a group of weights all have one regulariser, and that of live groups is another one.
        if reg is None or not single or not (reg.elementwise or len(ready) == len(group["params"])):
            continue
        found += [
            Candidate(i, place, p, reg)
            for place, p in enumerate(group["params"])
            if any(p is q for q in ready) and reg.spans(p.shape) is not None
        ]
    return found


class Supports:
    """Finds supports, and for each live weight so many others near the threshold, for regularisers by magnitude.

    Attributes:
        reach: entries with |v| beyond this share of λ are near.
    """

    def __init__(self, optimizer: BregmanOptimizer) -> None:
        self.optimizer = optimizer
        self.reach = 0.8

    def find(self, some: list[Candidate], margin: float) -> tuple[dict[nn.Parameter, Part], dict[nn.Parameter, Part]]:
        """The support of each weight, and the entries near the threshold that are trained along."""
        where: dict[nn.Parameter, Part] = {}
        near: dict[nn.Parameter, Part] = {}
        live = 0
        for i, _, p, reg in some:
            # The λ that θ was written with, if it has risen since: what is alive must not be left behind.
            lam = min(float(self.optimizer.param_groups[i]["lam"]), float(self.optimizer.state[p]["lam"]))
            if not margin or not reg.by_magnitude or lam <= 0:
                where[p] = part_of(p, reg)
                continue
            index = beyond(self.optimizer.state[p]["dual"], self.reach * lam)
            alive = Part(p, (), index).restrict(p) != 0
            where[p], near[p] = Part(p, (), index[alive]), Part(p, (), index[~alive])
            live += len(where[p])
        found = sum(map(len, near.values()))
        if near:  # about as many lie between the bound and λ as their distance says
            ratio = min(2.0, max(0.5, margin * max(live, 1) / max(found, 1)))
            self.reach = min(0.98, max(0.1, 1 - (1 - self.reach) * ratio))
        return where, near
