"""Rules for operations that move channels to another dimension: flatten, view, permute, indexing, and reading sizes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .walk import Walk, Wire, barrier, channelwise, only_input, options


@channelwise
def flatten(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    given = vars(module) if module else options(node, "input", "start_dim", "end_dim")
    start, end = given.get("start_dim", 0), given.get("end_dim", -1)
    if not (isinstance(start, int) and isinstance(end, int)):
        return barrier(walk, node, module)
    return merged(walk, node, module, wire, start, end)


def view(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """x.view(x.size(0), -1) and the like; where a size is written as a number, the channels cannot change it."""
    result, counted = viewed(walk, node)
    walk.hold_numbers([n for n in node.all_input_nodes if n is not counted])
    return barrier(walk, node, module) if result is None else result


def viewed(walk: Walk, node: fx.Node) -> tuple[Wire | None, Any]:
    """The wire of a view whose sizes follow the channels, and which of them is the number of channels."""
    wire = only_input(walk, node)
    before, after = walk.shapes[node.all_input_nodes[0]], walk.shapes[node]
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    if wire is None or node.kwargs or len(sizes) != len(after):
        return None, None
    at, last = _kept_place(before, after, wire.dim), len(after) - 1
    if at >= 0 and (_is_open(sizes[at]) or _counts(walk, sizes, at, wire)):
        return wire._replace(dim=at), sizes[at]
    if 0 < last <= wire.dim and after[:last] == before[:last] and _is_open(sizes[last]):
        return merged(walk, node, None, wire, last, len(before) - 1), None
    return None, None


def _is_open(size: Any) -> bool:
    return isinstance(size, int) and size == -1


def _counts(walk: Walk, sizes: tuple[Any, ...], at: int, wire: Wire) -> bool:
    """Whether this one of the sizes, and no other, is read from a tensor with the same channels."""
    size = sizes[at]
    known = isinstance(size, fx.Node) and size in walk.numbers and sum(other is size for other in sizes) == 1
    return known and torch.equal(walk.numbers[size].ids, wire.ids)


def _kept_place(before: tuple[int, ...], after: tuple[int, ...], dim: int) -> int:
    """The dimension of a view that is `dim` of what is viewed, between the same number of entries; -1 for none."""
    for at, size in enumerate(after):
        if size == before[dim] > 1 and math.prod(after[:at]) == math.prod(before[:dim]):
            return at
    return -1


def merged(walk: Walk, node: fx.Node, module: Any, wire: Wire, start: int, end: int) -> Wire | None:
    """Dimensions `start` to `end` become one, in which every channel has as many places as the others multiply to."""
    shape = walk.shapes[node.all_input_nodes[0]]
    start, end = start % len(shape), end % len(shape)
    if not start <= wire.dim <= end:
        return wire._replace(dim=wire.dim - (end - start if wire.dim > end else 0))
    if start == 0 < wire.dim:  # samples and channels in one dimension
        return barrier(walk, node, module)
    sizes = shape[start : end + 1]
    places = [-1 if start + i == wire.dim else 1 for i in range(len(sizes))]
    ids, constant, value = (t.view(places).expand(sizes).reshape(-1) for t in wire[1:])
    return Wire(start, ids, constant, value)


@channelwise
def permute(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    n = len(walk.shapes[node])
    if node.kwargs or len(dims) != n or not all(isinstance(d, int) for d in dims):
        return barrier(walk, node, module)
    return wire._replace(dim=[d % n for d in dims].index(wire.dim))  # type: ignore[operator]


@channelwise
def unsqueeze(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    dim = options(node, "input", "dim").get("dim")
    if not isinstance(dim, int):
        return barrier(walk, node, module)
    return wire._replace(dim=wire.dim + (dim % len(walk.shapes[node]) <= wire.dim))


@channelwise
def squeeze(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """Of single dimensions that are named; without, those of the channels or samples might go."""
    dim = options(node, "input", "dim").get("dim")
    before = walk.shapes[node.all_input_nodes[0]]
    if not isinstance(dim, int) or dim % len(before) == wire.dim:
        return barrier(walk, node, module)
    gone = before[dim % len(before)] == 1 and dim % len(before) < wire.dim
    return wire._replace(dim=wire.dim - gone)


@channelwise
def item(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """x[:, :, None, 0] and the like, where all channels are taken."""
    keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    before = after = 0
    for key in keys:
        if key is None:
            after += 1
        elif isinstance(key, slice | int) and before != wire.dim:
            before, after = before + 1, after + isinstance(key, slice)
        elif _is_all(key, walk.shapes[node.all_input_nodes[0]][before]):
            return wire._replace(dim=after)
        else:
            return barrier(walk, node, module)
    return wire._replace(dim=wire.dim + after - before)


def _is_all(key: Any, size: int) -> bool:
    """Whether a slice takes everything, and would of less."""
    if not isinstance(key, slice) or key.start not in (None, 0) or key.step not in (None, 1):
        return False
    return key.stop is None or (isinstance(key.stop, int) and key.stop >= size)


@channelwise
def transpose(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    given = options(node, "input", "dim0", "dim1")
    n = len(walk.shapes[node])
    a, b = given.get("dim0"), given.get("dim1")
    if not (isinstance(a, int) and isinstance(b, int)):
        return barrier(walk, node, module)
    a, b = a % n, b % n
    return wire._replace(dim={a: b, b: a}.get(wire.dim, wire.dim))


def read_sizes(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """x.size(), x.shape, x.dtype, ...: where the number of channels is used it must stay what it is, see `numbers`."""
    wire = only_input(walk, node)
    if wire is None:
        return None
    what = node.args[1] if node.target is getattr else node.target
    if what in ("dtype", "device", "ndim", "dim"):
        return None
    if what == "size" and len(node.args) + len(node.kwargs) == 2:
        _reads(walk, node, options(node, "input", "dim").get("dim"), wire, len(walk.shapes[node.all_input_nodes[0]]))
    elif what in ("size", "shape"):
        walk.numbers[node] = wire
    else:
        return barrier(walk, node, module)
    return None


def size_item(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """x.shape[1]"""
    source: Any = node.args[0]
    _reads(walk, node, node.args[1], walk.numbers[source], len(walk.shapes[source.all_input_nodes[0]]))
    return None


def _reads(walk: Walk, node: fx.Node, key: Any, wire: Wire, n: int) -> None:
    """Note whether sizes[key] is the number of channels; where it is one of several, it must stay."""
    if isinstance(key, int):
        if key % n == wire.dim:
            walk.numbers[node] = wire
    elif isinstance(key, slice) and all(x is None or isinstance(x, int) for x in (key.start, key.stop, key.step)):
        if wire.dim in range(n)[key]:
            walk.hold(wire.ids)
    else:
        walk.hold(wire.ids)
