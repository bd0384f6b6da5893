"""What the optimizer holds: the weights themselves, or their live parts in their place, with the state that belongs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import BregmanOptimizer
from ..optim.base import primal
from ..part import Part
from ..regularizers import Regularizer
from .layers import WatchedLayer, live_part
from .live import Live, part_of

NOT_SHAPED = ("step", "lam", "delta", "written", "waiting")  # what of the state is not shaped like the weight


@dataclass
class Exchanged:
    """A weight of the optimizer while it is restricted.

    Attributes:
        group, place: where it stands in the optimizer's `param_groups`.
        regularizer: of the full space.
        held: the state of the full space, in which only the entries off the support are up to date.
        small: the state of the live part.
    """

    group: int
    place: int
    live: Live
    regularizer: Regularizer | None
    held: dict[str, Any]
    small: dict[str, Any]

    def describe(self, layers: Iterable[WatchedLayer]) -> dict[str, Any]:
        """As plain values and tensors, with the names of the `layers` that compute with it."""
        live = self.live
        return {
            "group": self.group,
            "place": self.place,
            "shape": list(live.full.shape),
            "index": live.pattern.index,
            **({} if live.near is None else {"near": live.near.index}),
            "sparse": [layer.name for layer in layers if layer.live is live],
        }


class Exchange:
    """Exchanges weights of an optimizer for their live parts and back.

    Attributes:
        parts: the weights that are restricted now.
        entered: called with the live values of each that comes in.
    """

    def __init__(self, optimizer: BregmanOptimizer, entered: Callable[[Tensor], None] | None = None) -> None:
        self.optimizer, self.entered = optimizer, entered
        self.parts: list[Exchanged] = []

    def regularizer(self, group: int) -> Regularizer | None:
        """Of the full space."""
        known = [part.regularizer for part in self.parts if part.group == group]
        return known[0] if known else self.optimizer.regularizers[group]

    def weights(self) -> list[nn.Parameter]:
        """The parameters of the model that the optimizer trains, in full or in part."""
        full = {id(part.live.values): part.live.full for part in self.parts}
        return [full.get(id(p), p) for group in self.optimizer.param_groups for p in group["params"]]

    def places(self) -> dict[Tensor, tuple[int, int]]:
        """Group and place of every parameter that has a dual."""
        return {
            p: (i, place)
            for i, group in enumerate(self.optimizer.param_groups)
            for place, p in enumerate(group["params"])
            if "dual" in self.optimizer.state.get(p, {})
        }

    def enter(self, group: int, place: int, live: Live) -> None:
        """Put the live part of a weight in its place, with its state."""
        full, where = live.full, live.where
        held = self.optimizer.state[full]
        small = {
            name: where.restrict(value) if name not in NOT_SHAPED and isinstance(value, Tensor) else value
            for name, value in held.items()
        }
        live.begin()
        part = Exchanged(group, place, live, self.regularizer(group), held, small)
        self.parts.append(part)
        self._show(part, full=False)
        if self.entered is not None:
            self.entered(live.values)

    def enter_saved(self, saved: dict[str, Any], layers: Callable[[Tensor], list[WatchedLayer]]) -> None:
        """The same from what `Exchanged.describe` has told; `layers` finds those that have a weight."""
        i, place = saved["group"], saved["place"]
        try:
            full: nn.Parameter = self.optimizer.param_groups[i]["params"][place]
        except IndexError:
            raise ValueError(f"`state_dict` has a weight {place} in group {i}; the optimizer has none.") from None
        if list(full.shape) != saved["shape"]:
            raise ValueError(f"`state_dict` has a weight of shape {saved['shape']}; here it is {list(full.shape)}.")
        sparse = [layer for layer in layers(full) if layer.name in saved["sparse"]]
        reg = self.regularizer(i)
        near = Part(full, (), saved["near"]) if "near" in saved else None
        live = live_part(full, part_of(full, reg, saved["index"]), near, sparse)
        self.enter(i, place, live)
        if near is not None:  # those that have passed the threshold in this phase are no edit
            state = self.optimizer.state[live.values]
            weight = primal(state["dual"], reg, state["lam"], state["delta"])
            live.values[len(live.pattern) :] = weight[len(live.pattern) :]
        for layer in sparse:
            layer.live = live

    @torch.no_grad()
    def show(self, *, full: bool) -> None:
        """Let the optimizer hold the weights themselves, with their state brought up to date, or their live parts."""
        for part in self.parts:
            self._show(part, full=full)

    def _show(self, part: Exchanged, *, full: bool) -> None:
        optimizer, live = self.optimizer, part.live
        here, there = (live.full, live.values) if full else (live.values, live.full)
        if full:
            part.small = optimizer.state[live.values]
            for name, value in part.small.items():
                if name not in NOT_SHAPED and isinstance(value, Tensor):
                    if name not in part.held:  # a buffer that the coarse steps began
                        part.held[name] = torch.zeros_like(live.full, dtype=value.dtype)
                    live.where.prolong(value, part.held[name])
                else:
                    part.held[name] = value
        optimizer.state.pop(there, None)
        optimizer.state[here] = part.held if full else part.small
        optimizer.param_groups[part.group]["params"][part.place] = here
        reg = part.regularizer
        optimizer.regularizers[part.group] = reg if full or reg is None else reg.restricted()

    def end(self, *, gradients: bool) -> None:
        """Back to the weights themselves; `gradients`: with those of the live parts, as a step is still to come."""
        for part in self.parts:
            part.live.finish(gradient=gradients)
            if part.live.near is not None:
                # Entries near the threshold that have passed it wait there: the next fine step brings them to life.
                state = self.optimizer.state[part.live.values]
                lam = (1 - 4 * torch.finfo(state["dual"].dtype).eps) * float(state["lam"])
                state["dual"][len(part.live.pattern) :].clamp_(-lam, lam)
            self._show(part, full=True)
        self.parts = []
        self.optimizer.forget()

    def follow_edits(self) -> bool:
        """Let the live parts follow weights that were changed from outside; False where others have come alive."""
        edited = [part.live for part in self.parts if part.live.edited()]
        for live in edited:
            if torch.count_nonzero(live.full) != torch.count_nonzero(live.where.restrict(live.full)):
                return False
        for live in edited:
            live.read()
        return True
