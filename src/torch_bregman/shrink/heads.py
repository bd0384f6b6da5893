"""Attention without the heads that do not count."""

from __future__ import annotations

import contextlib
import operator

import torch
from torch import Tensor

from ..network import kinds
from ..network.graph import Graph
from ..network.removable import LAST
from ..network.trace import Untraceable
from .copy import ShrinkingCopy, known


@torch.no_grad()
def remove_heads(smaller: ShrinkingCopy, inputs: tuple[Tensor, ...]) -> None:
    """Take the heads out of the attentions whose values, or what is made of them, are zero."""
    names = [name for name in smaller.outcomes if kinds.of(smaller.twins[name][0]).has_heads]
    asked = None
    if names:
        with contextlib.suppress(Untraceable):
            asked = _asked_for_weights(Graph(smaller.model, inputs))
    for name in names:
        old, outcome = smaller.twins[name][0], smaller.outcomes[name]
        kind = kinds.of(old)
        alive = kind.live_heads(old)
        if known(old) is not kind:
            outcome.reason = f"is a {outcome.kind}, and what its own `forward` computes is not known"
        elif alive is None:
            outcome.reason = "has a bias or zeros among its keys"
        elif not alive.all():
            dead = int((~alive).sum())
            if asked is None or name in asked or old._forward_hooks or old._forward_pre_hooks:
                outcome.kept = dead
                outcome.reason = (
                    "torch.fx cannot follow the network" if asked is None else "its weights are used, or hooks"
                )
                continue
            if dead == len(alive):
                alive[0] = True
                outcome.kept, outcome.reason = 1, LAST
            smaller.replace(name, kind.with_heads(old, alive, smaller.exchange(name)))


def _asked_for_weights(graph: Graph) -> set[str]:
    """The modules of which more than the first result is used."""
    asked = set()
    for node in graph.traced().nodes:
        for user in node.users:
            if user.target is not operator.getitem or (user.args[1] != 0 and user.users):
                asked.add(str(node.target))
    return asked
