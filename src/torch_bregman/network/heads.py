"""Attention written by hand: heads are channels that are folded into a dimension of their own, and out of it again.

    q, k, v = (f(x).view(batch, time, heads, width).transpose(1, 2) for f in (query, key, value))
    y = out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, heads * width))

The numbers of heads stand in such code, so `edits` says which arguments of which operations have to change.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .shapes import merged
from .walk import Trace, Walk, Wire, barrier


class Heads(NamedTuple):
    """A tensor whose channels are in two dimensions, the heads and, last, the width of a head.

    Attributes:
        dim: of the heads.
        part: the dimension of queries, keys and values where they lie in one tensor.
        ids: [heads], or [parts, heads]; the channels of a head share one.
        constant: which heads are constant, like `ids`.
        value: the constants, [*ids.shape, width].
        sums: whether the last dimension sums to one: attention weights.
    """

    dim: int
    part: int | None
    ids: Tensor
    constant: Tensor
    value: Tensor
    sums: bool = False


class Edit(NamedTuple):
    """The argument `at` of a node (or entry `inner` of it) is the size of what is left of `ids`, per `each` of them."""

    node: fx.Node
    at: int | str
    inner: int | None
    ids: Tensor
    each: int


class HeadsWalk(Walk):
    """A walk that also follows heads.

    Attributes:
        heads: by node, of a tensor whose channels are in two dimensions.
        pieces: by node that returns several tensors, what is known of each.
        edits: which arguments of which operations change with the heads.
        spelled: the same, for numbers that are attributes in the network's own code, and change there.
    """

    def __init__(self, model: nn.Module, trace: Trace, alive: Mapping[str, Tensor]) -> None:
        self.heads: dict[Any, Heads] = {}
        self.pieces: dict[Any, list[Any]] = {}
        self.edits: list[Edit] = []
        self.spelled: list[Edit] = []
        super().__init__(model, trace, alive)

    def forget(self, node: fx.Node) -> None:
        super().forget(node)
        known = [self.heads.pop(node)] if node in self.heads else self.pieces.pop(node, [])
        for piece in known:
            self.hold(piece.ids.flatten())


#: (walk, node) → what is known of the result, or None: nothing
HeadsRule = Callable[[HeadsWalk, fx.Node], "Heads | Wire | list[Any] | None"]


def sizes_of(node: fx.Node) -> tuple[tuple[Any, ...], bool]:
    """The sizes that a view is given, and whether they come as one sequence."""
    last: Any = node.args[-1]
    return (tuple(last), True) if isinstance(last, tuple | list) else (node.args[1:], False)


def split(walk: HeadsWalk, node: fx.Node) -> Heads | Wire | None:
    """x.view(…, heads, width) or x.view(…, parts, heads, width) of a tensor whose channels lie last; or unflatten."""
    source: Any = node.args[0]
    wire, before = walk.wires[source], walk.shapes[source]
    after, n = walk.shapes[node], len(walk.shapes[source])
    extra = len(after) - n
    if extra <= 0:
        return flat(walk, node)
    if wire is None or wire.dim != n - 1 or extra not in (1, 2) or after[: n - 1] != before[: n - 1] or node.kwargs:
        return None
    sizes, inner = sizes_of(node)
    at = len(sizes) - 2
    if at < 0 or len(node.args) != (
        3 if node.target in ("unflatten", torch.unflatten) else 2 if inner else 1 + len(sizes)
    ):
        return None
    ids = wire.ids.view(after[n - 1 :])
    walk.pairs += [(ids[..., 0].flatten(), other.flatten()) for other in ids.movedim(-1, 0)[1:]]
    heads = Heads(
        len(after) - 2, len(after) - 3 if extra == 2 else None, ids[..., 0],
        wire.constant.view(ids.shape).all(-1), wire.value.view(ids.shape),
    )  # fmt: skip
    if extra == 2:  # one dimension for all parts: they have the same heads
        walk.pairs += [(heads.ids[0], other) for other in heads.ids[1:]]
    if sizes[at] != -1:
        counted = heads.ids if extra == 1 else heads.ids[0]
        walk.edits.append(Edit(node, len(node.args) - 1 if inner else 1 + at, at if inner else None, counted, 1))
    return heads


def flat(walk: HeadsWalk, node: fx.Node) -> Wire | None:
    """x.view(-1, channels * places), with the size in numbers."""
    source: Any = node.args[0]
    wire, before, after = walk.wires[source], walk.shapes[source], walk.shapes[node]
    last = len(after) - 1
    sizes, inner = sizes_of(node)
    if wire is None or node.kwargs or len(sizes) != len(after) or after[:last] != before[:last] or wire.dim < last:
        return None
    result = merged(walk, node, None, wire, last, len(before) - 1)
    if result is not None:
        walk.edits.append(Edit(node, len(node.args) - 1, last if inner else None, result.ids, 1))
    return result


def merge(walk: HeadsWalk, node: fx.Node) -> Wire | None:
    """y.reshape(…, heads * width) or y.flatten(-2): channels again."""
    source: Any = node.args[0]
    heads, before, after = walk.heads[source], walk.shapes[source], walk.shapes[node]
    last = len(after) - 1
    if heads.part is not None or heads.dim != len(before) - 2 or len(after) != len(before) - 1 or node.kwargs:
        return None
    if after != (*before[:-2], before[-2] * before[-1]) or heads.sums:
        return None
    if node.target not in ("flatten", torch.flatten):
        sizes, inner = sizes_of(node)
        if sizes[-1] != -1:
            place = len(sizes) - 1 if inner else None
            walk.edits.append(Edit(node, len(node.args) - 1, place, heads.ids, before[-1]))
    width = before[-1]
    return Wire(
        last, heads.ids.repeat_interleave(width), heads.constant.repeat_interleave(width),
        torch.where(heads.constant[:, None], heads.value, 0.0).flatten(),
    )  # fmt: skip


def move(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """transpose and permute; the width of a head stays last, or its place is taken by positions (kᵀ)."""
    heads = walk.heads[node.args[0]]
    n = len(walk.shapes[node])
    if node.kwargs:
        return None
    if node.target in ("permute", torch.permute):
        dims: Any = node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:]
    else:
        two: Any = node.args[1:3]
        if not all(isinstance(d, int) for d in two):
            return None
        a, b = (d % n for d in two)
        dims = [b if d == a else a if d == b else d for d in range(n)]
    if not all(isinstance(d, int) for d in dims):
        return None
    dims = [d % n for d in dims]
    part = None if heads.part is None else dims.index(heads.part)
    return heads._replace(dim=dims.index(heads.dim), part=part)


def keep(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """What changes nothing, or every entry by itself."""
    return walk.heads.get(node.args[0])


def stop(walk: HeadsWalk, node: fx.Node) -> None:
    """An operation that nothing is known about."""
    return


def scaled(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """Heads times a number, or masks for all heads alike."""
    inputs = [n for n in node.all_input_nodes if n in walk.heads]
    if len(inputs) != 1 or node.args[0] is not inputs[0] or "out" in node.kwargs:
        return None
    (source,) = inputs
    heads = walk.heads[source]
    place = heads.dim - len(walk.shapes[source])
    for other in node.all_input_nodes:
        shape = walk.shapes.get(other, ())
        if other is not source and len(shape) >= -place and shape[place] != 1:
            return None
        if other is not source and walk.wires.get(other) is not None:
            return None
    return heads._replace(constant=torch.zeros_like(heads.constant), sums=False)


def softmax(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """Attention weights, where it runs over the last dimension."""
    heads = walk.heads[node.args[0]]
    n = len(walk.shapes[node])
    module = walk.modules.get(str(node.target)) if node.op == "call_module" else None
    dim = module.dim if module is not None else node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if not isinstance(dim, int) or dim % n != n - 1 or heads.dim == n - 1:
        return None
    return heads._replace(constant=torch.zeros_like(heads.constant), sums=True)


def product(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """q kᵀ, or attention weights times v."""
    a, b = node.args
    if a not in walk.heads or b not in walk.heads:
        return None
    left, right = walk.heads[a], walk.heads[b]
    if left.part is not None or right.part is not None or left.dim != right.dim or right.sums:
        return None
    if left.dim >= len(walk.shapes[node]) - 2 or len(left.ids) != len(right.ids):
        return None
    walk.pairs.append((left.ids, right.ids))
    return right._replace(constant=right.constant & left.sums, sums=False)


def attention(walk: HeadsWalk, node: fx.Node) -> Heads | None:
    """F.scaled_dot_product_attention: where the values of a head are constant, so is what comes out."""
    q, k, v = (walk.heads.get(n) for n in node.args[:3])
    if q is None or k is None or v is None or not all(h.part is None and not h.sums for h in (q, k, v)):
        return None
    n = len(walk.shapes[node])
    if {q.dim, k.dim, v.dim} != {n - 3} or not len(q.ids) == len(k.ids) == len(v.ids):
        return None
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    shape = walk.shapes.get(mask, ()) if isinstance(mask, fx.Node) else ()
    if mask in walk.heads or (len(shape) > 2 and shape[-3] != 1):
        return None
    walk.pairs += [(q.ids, v.ids), (k.ids, v.ids)]
    return v


def item(walk: HeadsWalk, node: fx.Node) -> Heads | Wire | None:
    """q of (q, k, v): of a tensor whose first dimension they are, of unbind, chunk or split."""
    source, at = node.args
    if source in walk.pieces:
        return walk.pieces[source][at] if isinstance(at, int) else None
    heads = walk.heads[source]
    if heads.part != 0 or not isinstance(at, int):
        return None
    return _piece(heads, at)


def _piece(heads: Heads, at: int) -> Heads:
    assert heads.part is not None
    dim = heads.dim - (heads.dim > heads.part)
    return Heads(dim, None, heads.ids[at], heads.constant[at], heads.value[at])


def unbind(walk: HeadsWalk, node: fx.Node) -> list[Any] | None:
    heads = walk.heads[node.args[0]]
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    if heads.part is None or dim != heads.part:
        return None
    return [_piece(heads, i) for i in range(len(heads.ids))]


def chunk(walk: HeadsWalk, node: fx.Node) -> list[Any] | None:
    """chunk(parts, -1) and split(size, -1) of channels, into parts of one size whose channels correspond.

    Also split([size, size, ...], -1), where they need not.
    """
    source: Any = node.args[0]
    wire = walk.wires[source]
    n = len(walk.shapes[source])
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    size: Any = node.args[1] if len(node.args) > 1 else None
    if wire is None or not isinstance(dim, int) or dim % n != wire.dim:
        return None
    if isinstance(size, tuple | list) and all(isinstance(part, int) for part in size):
        walk.edits += [Edit(node, 1, i, ids, 1) for i, ids in enumerate(torch.split(wire.ids, list(size)))]
        return _parts(wire, list(size))
    if not isinstance(size, int | fx.Node):
        return None
    whole = len(wire.ids)
    if node.target in ("chunk", torch.chunk):
        if not isinstance(size, int) or whole % size:
            return None
        each = whole // size
    else:
        users = [user for user in node.users if user in walk.shapes]
        each = walk.shapes[users[0]][wire.dim] if users else 0
        if not each or whole % each:
            return None
        walk.edits.append(Edit(node, 1, None, wire.ids[:each], 1))
    ids = wire.ids.view(-1, each)
    walk.pairs += [(ids[0], other) for other in ids[1:]]
    return _parts(wire, each)


def _parts(wire: Wire, sizes: int | list[int]) -> list[Any]:
    parts = zip(*(torch.split(tensor, sizes) for tensor in wire[1:]), strict=True)
    return [Wire(wire.dim, *part) for part in parts]


#: operations on channels, on heads, and on the results of those with several
CHANNELS: dict[Any, HeadsRule] = {
    "view": split, "reshape": split, "unflatten": split, torch.reshape: split, torch.unflatten: split,
    "chunk": chunk, "split": chunk, torch.chunk: chunk, torch.split: chunk,
}  # fmt: skip
HEADS: dict[Any, HeadsRule] = {
    "view": merge, "reshape": merge, "flatten": merge, torch.reshape: merge, torch.flatten: merge,
    "transpose": move, "permute": move, torch.transpose: move, torch.permute: move, "contiguous": keep,
    "unbind": unbind, torch.unbind: unbind, operator.getitem: item,
    "softmax": softmax, torch.softmax: softmax, F.softmax: softmax, F.dropout: keep,
    operator.matmul: product, torch.matmul: product, "matmul": product, F.scaled_dot_product_attention: attention,
    **dict.fromkeys((operator.mul, operator.truediv, operator.add, torch.mul, torch.div, torch.add), scaled),
    **dict.fromkeys(("mul", "div", "add", "masked_fill"), scaled),
}  # fmt: skip


def follow(walk: HeadsWalk, node: fx.Node, rule: HeadsRule) -> Wire | None:
    """Apply a rule; where it does not hold, everything that goes in stays."""
    count = len(walk.pairs), len(walk.edits)
    result = rule(walk, node)
    if result is None:
        del walk.pairs[count[0] :], walk.edits[count[1] :]
        for source in node.all_input_nodes:
            if source in walk.heads:
                walk.hold(walk.heads[source].ids.flatten())
            for piece in walk.pieces.get(source, []):
                walk.hold(piece.ids.flatten())
        return barrier(walk, node, None)
    if isinstance(result, list):
        walk.pieces[node] = result
        return None
    if isinstance(result, Heads):
        walk.heads[node] = result
        return None
    return result
