"""Which channels a trained network can do without: those that nobody reads, and those that are constant.

Unlike for the coarse steps of training (`Graph.cut`) all weights are known and stay: a unit is dead as well if no layer
reads it, or if all that it reads is constant. A constant that a layer reads goes into its bias. Where a zero padding
makes that depend on the position, one constant channel stays and carries the others:
W[:, c] += Σ_j W[:, j] · x_j / x_c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from . import kinds
from .heads import CHANNELS, HEADS, HeadsRule, HeadsWalk, follow, stop
from .kinds.called import CALLED, called
from .lookup import operation
from .shapes import view, viewed
from .walk import Call, Operation, Trace, Walk, Wire, barrier, components, numbers

CARRIES = "carries the constants of removed ones through a zero padding"
LAST = "is the last one of its layer"
SHARED = "is joined with units that live"
MOVES = "has another constant in training than in evaluation"


class RemovableChannels(HeadsWalk):
    """The walk through a network whose weights stay as they are, in eval.

    Attributes:
        gone: which ids can go.
        attributes: parameters and buffers that the network's code reads: their names, the dimension of their channels,
            and the ids of these.
        edits: which arguments of which operations change with them; with `rewrite`, else such channels stay.
        carriers: by name of a layer with zero padding, which channel of its input carries the constants of the others;
            none without `carry`, then `fold` returns what they contribute as an image.
    """

    weights_change = False

    def __init__(
        self, model: nn.Module, trace: Trace, moving: Tensor | None = None, *, rewrite: bool = False, carry: bool = True
    ) -> None:
        self.needs: list[tuple[Tensor, str]] = []
        self.rewrite, self.carry = rewrite, carry
        self.attributes: list[tuple[str, int, Tensor]] = []
        self.unknown: set[fx.Node] = set()
        super().__init__(model, trace, {})
        if moving is not None:
            self.needs.append((moving, MOVES))
        self.label = components(self.count, self.pairs)
        self.reads = {call.name: _reads(call.module) for call in self.calls if kinds.of(call.module).mixes(call.module)}
        self.moves = torch.zeros(self.count, dtype=torch.bool)
        if moving is not None:
            self.moves[moving] = True
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

    def operation(self, node: fx.Node) -> Operation:
        """Attributes, layers that are written as functions, and heads of attention have rules of their own."""
        if node.op == "get_attr":
            return Operation(_attribute)
        usual = operation(self, node)
        if usual.rule is barrier and node.op == "call_function" and node.target in CALLED:
            usual = Operation(called, makes_new=True)
        function = node.op in ("call_function", "call_method")
        if not self.rewrite or not (function or node.op == "call_module"):
            return usual
        ours: HeadsRule | None = None
        sources = node.all_input_nodes
        if any(source in self.heads or source in self.pieces for source in sources):
            if function:
                ours = HEADS.get(node.target, stop)
            else:
                ours = stop if usual.module is None else kinds.of(usual.module).follow_heads
        elif function and usual.rule in (barrier, view) and sources and self.wires.get(sources[0]) is not None:
            ours = CHANNELS.get(node.target)
            if usual.rule is view and viewed(self, node)[0] is not None:
                ours = None
        if ours is None:
            return usual
        found = ours
        return usual._replace(rule=lambda walk, node, module: follow(self, node, found), numbers=False)

    def at(self, node: fx.Node, dim: int) -> Wire:
        """Of a parameter or buffer all is known; but who used it before its channels were looked for needs all."""
        tensor = self.owned.get(str(node.target)) if node.op == "get_attr" else None
        early = self.node is not node and len(node.users) > 1
        if tensor is None or early or self.wires.get(node) is not None or node in self.unknown:
            return super().at(node, dim)
        channels = numbers(tensor).movedim(dim, 0).flatten(1) if tensor.dim() > 1 else numbers(tensor)[:, None]
        wire = self.emit(dim, self.new(len(channels)), (channels == channels[:, :1]).all(1), channels[:, 0])
        self.attributes.append((str(node.target), dim, wire.ids))
        self.wires[node] = wire
        return wire

    def forget(self, node: fx.Node) -> None:
        super().forget(node)
        self.unknown.add(node)

    def hold(self, ids: Tensor) -> None:
        self.needs.append((ids, _operation(self.node, self.module)))

    def vary(self, ids: Tensor) -> None:
        """That a channel is not constant matters only to those who read it."""

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
        """An id of a layer of which nothing would be left, for that would be no layer; nor is one without inputs."""
        sides = [ids for call in self.calls for ids in (call.output.ids, call.source.ids)]
        for ids in (*sides, *(ids for _, _, ids in self.attributes)):
            if len(ids) and self.gone[ids].all():
                return ids[0]
        return None

    def _carriers(self) -> tuple[dict[str, int], Tensor | None]:
        """For layers with zero padding the input that carries those that go; or an id that must stay for it."""
        carriers = {}
        for call in self.calls:
            kind = kinds.of(call.module)
            if (self.carry or kind.needs_carrier) and call.name in self.reads and kind.padded(call.module):
                source = call.source
                gone, known = self.gone[source.ids], source.constant & (source.value != 0)
                lost = gone & known & self.reads[call.name][~self.gone[call.output.ids]].any(0)
                if not lost.any():
                    continue
                size = source.value.abs()
                able = known & ~gone & ~self.moves[source.ids]
                able &= 4 * size >= size[lost].max()  # divided by something small, rounding would grow
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
        one = components(self.count, self.joined)
        unread = torch.ones(self.count, dtype=torch.bool)
        unread[one[torch.cat(read)]] = False
        unread = unread[one]
        silent = (kinds.of(call.module).matrix(call.module) == 0).cpu().flatten(1).all(1)
        return call.output.constant | silent | unread[call.output.ids]

    @torch.no_grad()
    def fold(self, call: Call) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Of a layer that mixes: the inputs that stay, its weight on all that stays, and what is added to the bias.

        That is [outputs], or [outputs, *positions] where it depends on the position.
        """
        module, kind = call.module, kinds.of(call.module)
        outputs = (~self.gone[call.output.ids]).nonzero().view(-1)
        lost = self.gone[call.source.ids]
        weight, shift = numbers(kind.matrix(module))[outputs], None
        known = lost & call.source.constant & (call.source.value != 0)
        if known.any():
            part = weight[:, known]
            value = call.source.value[known]
            if call.name in self.carriers:
                at = self.carriers[call.name]
                share = value / call.source.value[at]
                weight[:, at] += (part * share.view(1, -1, *[1] * (part.dim() - 2))).sum(1)
            elif part.any() and kind.padded(module):
                like = kind.matrix(module)
                shift = kind.constant_image(module, part.to(like), value.to(like), call.positions).cpu()
            elif part.any():
                shift = part[..., None].flatten(2).sum(2) @ value
        inputs = (~lost).nonzero().view(-1) if lost.any() else None
        return inputs, weight if inputs is None else weight[:, inputs], shift


def _attribute(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """A tensor that has more than one entry along one dimension has its channels there; of others the use says it."""
    places = [dim for dim, size in enumerate(walk.shapes.get(node, ())) if size > 1]
    own = str(node.target) in walk.owned and not any(user.target in CALLED for user in node.users)
    return walk.at(node, places[0]) if own and len(places) == 1 else None


def _reads(module: Any) -> Tensor:
    """[out, in]: whether a weight, or a kernel, is not zero."""
    return (kinds.of(module).matrix(module) != 0).cpu()[..., None].flatten(2).any(2)


def _operation(node: fx.Node, module: Any) -> str:
    if node.op == "output":
        return "is an output of the network"
    if node.op == "call_module" and module is None:
        return f"goes through {str(node.target)!r}, which is called twice, shares weights or has a hook"
    if node.op == "call_module":
        return f"goes through {type(module).__name__} {str(node.target)!r}, which needs all channels"
    name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return f"goes through `{name}`, which needs all channels"
