"""Which channels a trained network can do without: those that nobody reads, and those that are constant.

Unlike for the coarse steps of training (`Graph.cut`) all weights are known and stay: a unit is dead as well if no layer
reads it, or if all that it reads is constant. A constant that a layer reads goes into its bias. Where a zero padding
makes that depend on the position, one constant channel stays and carries the others:
W[:, c] += Σ_j W[:, j] · x_j / x_c.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import (
    MODULES,
    Call,
    Rule,
    Trace,
    Walk,
    Wire,
    barrier,
    channelwise,
    components,
    constant_image,
    constants,
    layer,
    numbers,
    oriented,
    padded,
    view,
)
from .heads import CHANNELS, HEADS, Edit, Heads, follow, same, sizes_of, softmax, stop

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
CARRIES = "carries the constants of removed ones through a zero padding"
LAST = "is the last one of its layer"
SHARED = "is joined with units that live"
MOVES = "has another constant in training than in evaluation"


@channelwise
def _group_norm(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """A group that is constant as a whole becomes constants; it goes as a whole, or stays."""
    if wire.dim != 1:
        return barrier(walk, node, module)
    ids, known, value = (t.view(module.num_groups, -1) for t in wire[1:])
    walk.pairs += [(ids[:, 0], other) for other in ids.T[1:]]
    mean, variance = value.mean(1, keepdim=True), value.var(1, unbiased=False, keepdim=True)
    value = ((value - mean) / (variance + module.eps).sqrt()).view(-1)
    if module.weight is not None:
        value = value * numbers(module.weight) + numbers(module.bias)
    output = walk.emit(1, wire.ids, known.all(1, keepdim=True).expand_as(known).reshape(-1), value)
    walk.calls.append(Call(str(node.target), module, wire, output, torch.ones(len(value), dtype=torch.bool), ()))
    return output


def _embedding(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Columns that are the same for all tokens are constant."""
    if len(node.args) != 1 or node.kwargs or module.max_norm is not None:
        return barrier(walk, node, module)
    weight = module.weight.detach().cpu()
    n, dim = weight.shape[1], len(walk.shapes[node]) - 1
    output = walk.emit(dim, walk.new(n), (weight == weight[:1]).all(0), weight[0])
    none = Wire(dim, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), torch.empty(0))
    walk.calls.append(Call(str(node.target), module, none, output, torch.ones(n, dtype=torch.bool), ()))
    return output


@channelwise
def _prelu(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    if module.num_parameters > 1:
        return barrier(walk, node, module)
    value = torch.where(wire.value > 0, wire.value, numbers(module.weight) * wire.value)
    return walk.emit(wire.dim, wire.ids, wire.constant, value)


def mixes(call: Call) -> bool:
    """Whether every unit of the layer may read all channels, not those of its own group alone."""
    return isinstance(call.module, LAYERS) and getattr(call.module, "groups", 1) == 1


class Unused(Walk):
    """The walk through a network whose weights stay as they are, in eval.

    Attributes:
        gone: which ids can go.
        edits: which arguments of which operations change with them; with `rewrite`, else such channels stay.
        carriers: by name of a layer with zero padding, which channel of its input carries the constants of the others;
            none without `carry`, then `fold` returns what they contribute as an image.
    """

    rules: Mapping[type, Rule] = {
        **MODULES,
        nn.GroupNorm: _group_norm,
        nn.Embedding: _embedding,
        nn.PReLU: _prelu,
        **dict.fromkeys(TRANSPOSED, layer),
    }

    def __init__(
        self, model: nn.Module, trace: Trace, moving: Tensor | None = None, *, rewrite: bool = False, carry: bool = True
    ) -> None:
        self.needs: list[tuple[Tensor, str]] = []
        self.heads: dict[Any, Heads] = {}
        self.pieces: dict[Any, list[Any]] = {}
        self.edits: list[Edit] = []
        self.rewrite, self.carry = rewrite, carry
        super().__init__(model, trace, {})
        if moving is not None:
            self.needs.append((moving, MOVES))
        self.label = components(self.count, self.pairs)
        self.reads = {call.name: _reads(call.module) for call in self.calls if mixes(call)}
        kept = self._all(torch.cat([torch.empty(0, dtype=torch.int64), *(ids for ids, _ in self.needs)]))
        self.forced = torch.zeros_like(kept)
        self.carriers: dict[str, int] = {}
        while True:
            self.gone = self._gone(kept | self.forced)
            more = self._missing()
            if more is None:
                self.carriers, more = self._carriers()
            if more is None:
                break
            self.forced |= self.label == self.label[more]

    # ---- what the rules report

    def rule(self, node: fx.Node) -> tuple[Rule, Any]:
        """Heads of attention have rules of their own."""
        usual, module = super().rule(node)
        if not self.rewrite or node.op not in ("call_function", "call_method", "call_module"):
            return usual, module
        ours: Any = None
        sources = node.all_input_nodes
        if any(source in self.heads or source in self.pieces for source in sources):
            if isinstance(module, nn.Dropout | nn.Identity):
                ours = same
            elif isinstance(module, nn.Softmax):
                ours = softmax
            else:
                ours = HEADS.get(node.target, stop)
        elif usual in (barrier, view) and sources and self.wires.get(sources[0]) is not None:
            ours = CHANNELS.get(node.target)
            if usual is view and _free(node):
                ours = None
        if ours is None:
            return usual, module
        return (lambda walk, node, module: follow(self, node, ours)), module

    def hold(self, ids: Tensor) -> None:
        self.needs.append((ids, _operation(self.node, self.module)))

    def vary(self, ids: Tensor) -> None:
        """That a channel is not constant matters only to those who read it."""

    def units(self, name: str, module: Any, wire: Wire) -> tuple[Tensor, Tensor, Tensor]:
        alive = torch.ones(len(oriented(module)), dtype=torch.bool)
        bias = torch.zeros(len(alive)).double() if module.bias is None else numbers(module.bias)
        return (alive, *constants(module, wire, alive, bias, trained=False))

    # ---- what follows from it

    def _all(self, ids: Tensor) -> Tensor:
        """Marks `ids` and all that they only exist together with."""
        marked = torch.zeros(self.count, dtype=torch.bool)
        marked[self.label[ids]] = True
        return marked[self.label]

    def _gone(self, kept: Tensor) -> Tensor:
        """All that is neither kept nor read by a unit that stays; each that goes reads no more, so again."""
        gone = torch.zeros_like(kept)
        while True:
            read = [torch.empty(0, dtype=torch.int64)]
            for call in self.calls:
                if call.name in self.reads:
                    columns = self.reads[call.name][~gone[call.output.ids]].any(0)
                    read.append(call.source.ids[columns & ~call.source.constant])
            now = ~(kept | self._all(torch.cat(read)))
            if torch.equal(now, gone):
                return gone
            gone = now

    def _missing(self) -> Tensor | None:
        """An id of a layer of which nothing would be left, for that would be no layer."""
        for call in self.calls:
            if len(call.output.ids) and self.gone[call.output.ids].all():
                return call.output.ids[0]
        return None

    def _carriers(self) -> tuple[dict[str, int], Tensor | None]:
        """For layers with zero padding the input that carries those that go; or an id that must stay for it."""
        carriers = {}
        for call in self.calls:
            carry = self.carry or isinstance(call.module, TRANSPOSED)
            if carry and call.name in self.reads and isinstance(call.module, LAYERS[1:]) and padded(call.module):
                source = call.source
                gone, known = self.gone[source.ids], source.constant & (source.value != 0)
                lost = gone & known & self.reads[call.name][~self.gone[call.output.ids]].any(0)
                if not lost.any():
                    continue
                size = source.value.abs()
                able = known & ~gone & (4 * size >= size[lost].max())  # divided by something small, rounding would grow
                if not able.any():
                    return {}, source.ids[int(size.where(lost, 0.0).argmax())]
                carriers[call.name] = int(size.where(able, 0.0).argmax())
        return carriers, None

    def reason(self, ids: Tensor) -> list[str]:
        """Why each of these stays, though its unit is dead."""
        marks = [(self._all(needed), why) for needed, why in self.needs]
        carrying = {int(self.label[c.source.ids[self.carriers[c.name]]]) for c in self.calls if c.name in self.carriers}
        found = []
        for i in ids.tolist():
            why = next((why for mark, why in marks if mark[i]), None)
            if why is None and self.forced[i]:
                why = CARRIES if int(self.label[i]) in carrying else LAST
            found.append(why or SHARED)
        return found

    def dead(self, call: Call) -> Tensor:
        """The units of a layer that are constant or that nobody reads."""
        read = [torch.empty(0, dtype=torch.int64)]
        read += [c.source.ids[self.reads[c.name].any(0)] for c in self.calls if c.name in self.reads]
        read += [ids for ids, _ in self.needs]
        unread = torch.ones(self.count, dtype=torch.bool)
        unread[torch.cat(read)] = False
        weight: Any = call.module.weight.T if isinstance(call.module, nn.Embedding) else oriented(call.module)
        silent = (weight.detach() == 0).cpu().flatten(1).all(1)
        return call.output.constant | silent | unread[call.output.ids]

    @torch.no_grad()
    def fold(self, call: Call) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Of a layer that mixes: outputs and inputs that stay, its weight there, and what is added to the bias.

        That is [outputs], or [outputs, *positions] where it depends on the position.
        """
        module: Any = call.module
        outputs = (~self.gone[call.output.ids]).nonzero().view(-1)
        lost = self.gone[call.source.ids]
        weight, shift = numbers(oriented(module))[outputs], None
        known = lost & call.source.constant & (call.source.value != 0)
        if known.any():
            part = weight[:, known]
            value = call.source.value[known]
            if call.name in self.carriers:
                at = self.carriers[call.name]
                share = value / call.source.value[at]
                weight[:, at] += (part * share.view(1, -1, *[1] * (part.dim() - 2))).sum(1)
            elif part.any() and isinstance(module, LAYERS[1:]) and padded(module):
                like = module.weight
                shift = constant_image(module, part.to(like), value.to(like), call.positions).cpu()
            elif part.any():
                shift = part[..., None].flatten(2).sum(2) @ value
        inputs = (~lost).nonzero().view(-1) if lost.any() else None
        return outputs, inputs, weight if inputs is None else weight[:, inputs], shift


def _reads(module: Any) -> Tensor:
    """[out, in]: whether a weight, or a kernel, is not zero."""
    return (oriented(module) != 0).cpu()[..., None].flatten(2).any(2)


def _free(node: fx.Node) -> bool:
    """Whether the last size of a view is left open, so that the channels may change."""
    sizes, _ = sizes_of(node)
    return bool(sizes) and isinstance(sizes[-1], int) and sizes[-1] == -1


def _operation(node: fx.Node, module: Any) -> str:
    if node.op == "output":
        return "is an output of the network"
    if node.op == "call_module" and module is None:
        return f"goes through {str(node.target)!r}, which is called twice, shares weights or has a hook"
    if node.op == "call_module":
        return f"goes through {type(module).__name__} {str(node.target)!r}, which needs all channels"
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"goes through `{name}`, which needs all channels"
