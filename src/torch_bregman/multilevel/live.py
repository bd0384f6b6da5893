"""A weight in the full space and its live part, which the optimizer trains in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..part import Part
from ..regularizers import Regularizer
from . import restricted
from .gradient import LiveGradient


class Live:
    """A weight W in the full space and its live part, which the optimizer trains in its place.

    Entries `near` the threshold may be trained along: their v moves with their gradient, but W stays zero there until
    the optimizer has W again.

    Attributes:
        full: W. Always holds the live values, and zeros elsewhere.
        pattern: the live entries or groups of W.
        near: further entries, or None.
        entries: the pattern that a layer computes with, entry by entry.
        where: both, one after the other.
        values: of `where`; as long as W is restricted, those of `near` are not looked at.
        finished: the optimizer holds W again, and its gradient is that of all of W.
        version: of W when it was last written here; another one says that somebody else wrote to it.
        stale: the values have moved on since W was written; it is brought up to date when somebody looks at it.
    """

    def __init__(self, full: nn.Parameter, pattern: Part, near: Part | None = None, entries: Any = None) -> None:
        self.full, self.pattern, self.near = full, pattern, near
        self.entries = pattern if entries is None else entries
        self.where = pattern
        if near is not None:
            self.where = Part(full, (), torch.cat([pattern.index, near.index]))
        where = self.where
        self.plain = full.detach()  # W, for those who know what they do
        self.values = nn.Parameter(where.restrict(full))
        self.finished = self.stale = self.waits = False
        self.version = full._version
        self._hook: Any = None

    def begin(self) -> None:
        """The optimizer holds the live part: from now on gradients of W are gradients of it."""
        self._receive()  # of the last step; whoever does not clear gradients adds the next ones to it
        restricted.begin(self.full, self)
        hook = self.full.register_post_accumulate_grad_hook(lambda _: self._receive())  # type: ignore[no-untyped-call]
        self._hook = hook

    def _receive(self) -> None:
        """Take over the gradient that a dense computation has left."""
        grad = restricted.own(self.full, "grad")
        if grad is None:
            return
        restricted.set_own(self.full, "grad", None)
        _without_graph(grad)
        part = self.where.restrict(grad.dense() if isinstance(grad, LiveGradient) else grad)
        self.values.grad = part if self.values.grad is None else self.values.grad.add_(part)

    @property
    def gradient(self) -> LiveGradient | None:
        """That of the live part, in the shape of W."""
        self._receive()
        if self.values.grad is None:
            return None
        _without_graph(self.values.grad)
        return LiveGradient(self.values.grad, self.where)

    @gradient.setter
    def gradient(self, gradient: Tensor | None) -> None:
        if isinstance(gradient, LiveGradient) and gradient.held is self.values.grad and gradient.shows is None:
            return
        restricted.set_own(self.full, "grad", None if gradient is None else gradient)  # torch sees whether it fits
        self.values.grad = None
        self._receive()

    def wait(self) -> None:
        """Nobody reads W in the steps to come: write it only when somebody does."""
        self.waits = restricted.wait(self.full)

    def write(self) -> None:
        """The values, to where they belong in W."""
        self.stale = True
        if not self.waits:
            self.flush()

    def flush(self) -> None:
        """Bring W up to date."""
        if self.stale:
            self.stale = False
            with torch.no_grad():
                self.pattern.prolong(self.values.detach()[: len(self.pattern)], self.plain)
            self.version = self.plain._version

    def read(self) -> None:
        """The values, from W."""
        self.values.detach()[: len(self.pattern)].copy_(self.pattern.restrict(self.plain))
        self.version = self.plain._version

    def edited(self, *, closely: bool = False) -> bool:
        """Whether W was changed from outside; `closely` compares the values too, which finds changes of `.data`."""
        if self.plain._version != self.version:
            return True
        if not closely or self.stale:
            return False
        return not torch.equal(self.pattern.restrict(self.plain), self.values.detach()[: len(self.pattern)])

    def finish(self, *, gradient: bool = False) -> None:
        """Leave gradients where they belong; the values stay for those that still compute with them.

        `gradient`: W gets the one of the live part, with zeros elsewhere.
        """
        self.flush()
        self.waits = False
        self.finished = True
        if self._hook is None:
            return
        shown = self.gradient
        restricted.end(self.full)
        self._hook.remove()
        if gradient and shown is not None:
            self.full.grad = shown.dense()


def _without_graph(grad: Tensor) -> None:
    if grad.requires_grad:
        raise RuntimeError(
            "backward(create_graph=True) has left a gradient that Multilevel cannot show in a coarse phase; call "
            "torch.autograd.grad(loss, inputs, create_graph=True) for what is differentiated again, then backward()."
        )


def part_of(weight: Tensor, regularizer: Regularizer | None, index: Tensor | None = None) -> Part:
    """The live part of a weight, in the units of its regulariser; in single entries without one."""
    spans = () if regularizer is None else regularizer.spans(weight.shape)
    return Part(weight, spans or (), index)
