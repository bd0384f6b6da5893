"""Everything without the units that do not count."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..network import kinds
from ..network.graph import Graph
from ..network.heads import Edit
from ..network.kinds import Kept
from ..network.kinds.called import resize
from ..network.removable import RemovableChannels
from ..network.trace import Untraceable, without_noise
from ..network.walk import Call
from .copy import ShrinkingCopy, known
from .image import AddImage


@torch.no_grad()
def remove_units(
    smaller: ShrinkingCopy, inputs: tuple[Tensor, ...], *, training: bool = False, carry: bool = True
) -> None:
    """Cut all layers to the channels that are needed.

    `training`: the copy is trained on, so constants must be those of training as well. `carry`: a channel carries the
    constants that a zero padding makes depend on the position; else they are added as an image.
    """
    try:
        graph = Graph(smaller.model, inputs)
        nodes = graph.traced().nodes
        plain = sum(node.op == "placeholder" for node in nodes) == len(inputs)
        walk = RemovableChannels(smaller.model, graph.traced(), rewrite=plain and not training, carry=carry)
        moving = _moving(smaller.model, graph, walk) if training else None
        if moving is not None and len(moving):
            walk = RemovableChannels(smaller.model, graph.traced(), moving)
    except Untraceable as error:
        smaller.notes.append(f"No units were removed: {error}")
        for outcome in smaller.outcomes.values():
            outcome.reason = outcome.reason or "torch.fx cannot follow the network"
        return
    for call in walk.calls:
        _explain(smaller, walk, call)
    called = {_owner(call) for call in walk.calls}
    for name, outcome in smaller.outcomes.items():
        module = smaller.twins[name][0]
        if name in called or kinds.of(module).has_heads or outcome.reason:
            continue
        outcome.reason = "is called in another way than once with one tensor"
        if name in graph.traced().fixed:
            outcome.reason = "is called twice, shares weights, or has a hook or another reader of its weights"
        if known(module) is not kinds.of(module):
            outcome.reason = f"is a {outcome.kind}, and what its own `forward` computes is not known"
            if known(module).rows_are_outputs:
                outcome.kept = int((kinds.of(module).matrix(module) == 0).flatten(1).all(1).sum())
    for call in walk.calls:
        _cut(smaller, walk, call)
    for name, dim, ids in walk.attributes:
        if walk.gone[ids].any():
            owner, _, leaf = name.rpartition(".")
            smaller.exchange(owner)(leaf, *[None] * dim, (~walk.gone[ids]).nonzero().view(-1))
    edits = [edit for edit in walk.edits if walk.gone[edit.ids].any()]
    if plain and not training:
        smaller.traced = partial(_rewritten, nodes[0].graph, edits + walk.spelled, walk.gone)
    if edits and smaller.traced is not None:
        smaller.code = smaller.traced()
        smaller.notes.append(
            f"Sizes that change (heads, or a view) stand in the code of {type(smaller.original).__name__}: what comes "
            "out is a torch.fx.GraphModule of it as it computes in eval."
        )


def _moving(model: nn.Module, graph: Graph, walk: RemovableChannels) -> Tensor | None:
    """Ids whose constants are others in training, where norms take the statistics of the batch."""
    model.train()
    without_noise(model, norms=False)
    training = RemovableChannels(model, graph.traced())
    model.eval()
    if training.count != walk.count or len(training.calls) != len(walk.calls):
        return torch.arange(walk.count)
    moving = [torch.empty(0, dtype=torch.int64)]
    for a, b in zip(walk.calls, training.calls, strict=True):
        size = a.source.value.abs().max() if len(a.source.ids) else torch.tensor(0.0)
        same = b.source.constant & ((a.source.value - b.source.value).abs() <= 1e-6 * size)
        moving.append(a.source.ids[a.source.constant & ~same])
    return torch.cat(moving)


def _owner(call: Call) -> str:
    """The name of the module that is called, or that holds the tensors of a function."""
    return call.name.rpartition(".")[0] if call.tensors else call.name


def _explain(smaller: ShrinkingCopy, walk: RemovableChannels, call: Call) -> None:
    """Note how many dead units stay, and why."""
    outcome = smaller.outcomes.get(_owner(call))
    if outcome is not None:
        kept = call.output.ids[walk.dead(call) & ~walk.gone[call.output.ids]]
        outcome.kept, outcome.reason = len(kept), "; ".join(dict.fromkeys(walk.reason(kept)))


def _cut(smaller: ShrinkingCopy, walk: RemovableChannels, call: Call) -> None:
    """Cut the module of a call to the channels that stay."""
    module: Any = call.module if call.tensors else smaller.twins[call.name][1]
    kind = kinds.of(module)
    gone = walk.gone[call.output.ids]
    kept, image = Kept((~gone).nonzero().view(-1) if gone.any() else None), None
    if kind.mixes(module):
        inputs, weight, shift = walk.fold(call)
        if shift is not None and shift.dim() > 1:
            image, shift = shift.to(module.weight), None
        kept = Kept(kept.outputs, inputs, weight, shift)
    if kept.outputs is None and kept.inputs is None:
        return
    if call.tensors:
        kind.cut(module, kept, smaller.lend(call.tensors, module))
        resize(smaller.twins[_owner(call)][1], module)
        return
    kind.cut(module, kept, smaller.exchange(call.name))
    if image is not None:
        smaller.replace(call.name, nn.Sequential(module, AddImage(image[None])))


def _rewritten(code: fx.Graph, edits: list[Edit], gone: Tensor) -> fx.Graph:
    """The same operations with other numbers of heads."""
    twins: dict[fx.Node, fx.Node] = {}
    new = fx.Graph()
    new.output(new.graph_copy(code, twins))
    for edit in edits:
        node, left = twins[edit.node], int((~gone[edit.ids]).sum()) * edit.each
        args: list[Any] = list(node.args)
        if isinstance(edit.at, str):
            node.kwargs = {**node.kwargs, edit.at: left}
            continue
        if edit.inner is None:
            args[edit.at] = left
        else:
            inner = list(args[edit.at])
            inner[edit.inner] = left
            args[edit.at] = tuple(inner)
        node.args = tuple(args)
    return new
