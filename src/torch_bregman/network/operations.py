"""Rules for operations that work channel by channel: pointwise functions, dropout, pooling, means, concatenation.

Each is (walk, node, its module or None) → the wire of the result; see walk.py. The same rules serve functions, methods
and modules: which is which stands in functions.py and in `kinds`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .memory import name_of
from .walk import Walk, Wire, barrier, channelwise, only_input, options, unchanged, zeros_stay


def pointwise(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """f(x), x + y, ...: of constants, a constant."""
    nodes = node.all_input_nodes
    wires = None if "out" in node.kwargs else aligned(walk, node)
    if wires is None:
        return barrier(walk, node, module)
    constants = torch.stack([wire.constant for wire in wires.values()])
    channels = torch.stack([wire.value for wire in wires.values()])
    constant, value = constants.all(0), channels[0]
    if len(wires) < len(nodes):  # one number for all channels, which is not followed
        constant = torch.zeros_like(constant)
    else:
        values = {n: wire.value.clone() for n, wire in wires.items()}
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if module is not None:
            value = module.forward(*args, **kwargs)
        elif node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    if name_of(node).strip("_") in PRODUCTS:  # zero, whatever the other is
        zero = (constants & (channels == 0)).any(0)
        constant, value = constant | zero, torch.where(zero, 0.0, value)
    first = next(iter(wires.values()))
    return walk.emit(first.dim, first.ids, constant, value)


PRODUCTS = ("mul", "imul", "multiply")


def aligned(walk: Walk, node: fx.Node) -> dict[fx.Node, Wire] | None:
    """Where the channels of the inputs correspond one to one: the wires of those that have them, as the result has.

    The inputs are broadcast, so dimensions are counted from the last. Inputs that have one entry for all channels are
    left out. None if the channels do not correspond, or no input has any.
    """
    nodes, n = node.all_input_nodes, len(walk.shapes[node])
    known = [x for x in nodes if walk.wires[x] is not None]
    # A parameter has its channels where the others have theirs.
    known = [x for x in known if x.op != "get_attr"] or known
    places = {wire.dim - len(walk.shapes[x]) for x in known if (wire := walk.wires[x]) is not None}
    if len(places) != 1:
        return None
    (place,) = places
    wires: dict[fx.Node, Wire] = {}
    for x in nodes:
        shape = walk.shapes.get(x, ())
        if len(shape) >= -place and shape[place] == walk.shapes[node][place]:
            wires[x] = walk.at(x, len(shape) + place)._replace(dim=n + place)
        elif (wire := walk.wires[x]) is not None:  # one channel for all of the others
            walk.hold(wire.ids)
    first, *others = wires.values()
    walk.join([(first.ids, other.ids) for other in others])
    return wires


def dropout(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Zeros stay zeros; other constants only where nothing is dropped."""
    given = options(node, "input", "p", "training")
    p, training = (module.p, module.training) if module else (given.get("p", 0.5), given.get("training", True))
    return unchanged(walk, node, module) if p == 0 or not training else zeros_stay(walk, node, module)


@channelwise
def pad(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """Around other dimensions than the channels': a constant stays one where the border has it too."""
    given = options(node, "input", "pad", "mode", "value")
    sides, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value") or 0.0
    dims = len(walk.shapes[node])
    if not isinstance(sides, tuple | list) or not isinstance(value, int | float):
        return barrier(walk, node, module)
    if any(differs(sides[i], 0) for i in range(len(sides)) if dims - 1 - i // 2 == wire.dim):
        return barrier(walk, node, module)
    same = wire.constant & (wire.value == value) if mode == "constant" else wire.constant
    return walk.emit(wire.dim, wire.ids, same, wire.value)


AVERAGE = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MAXIMUM = ("input", "kernel_size", "stride", "padding", "dilation")


def pool(spatial: int, names: tuple[str, ...], walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Pooling over the last `spatial` dimensions: constants stay what they are."""
    wire = only_input(walk, node)
    if wire is None or wire.dim != len(walk.shapes[node]) - spatial - 1:
        return barrier(walk, node, module)
    given = {name: getattr(module, name, None) for name in names} if module else options(node, *names)
    padded = differs(given.get("padding"), 0)
    if padded and differs(given.get("dilation"), 1):  # a window may lie outside altogether
        return barrier(walk, node, module)
    if given.get("divisor_override") is not None or (padded and given.get("count_include_pad", names is AVERAGE)):
        return zeros_stay(walk, node, module)
    return wire


def differs(option: Any, usual: int) -> bool:
    """Whether an option per dimension is, in one of them, not the usual one."""
    if option is None:
        return False
    return any(o != usual for o in option) if isinstance(option, tuple | list) else option != usual


@channelwise
def interpolate(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    names = ("input", "size", "scale_factor", "mode")
    mode = module.mode if module else options(node, *names).get("mode", "nearest")
    # The weights of the other modes do not sum to one exactly.
    exact = mode in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear") and wire.dim == 1
    return wire if exact else barrier(walk, node, module)


@channelwise
def mean(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """Mean or maximum over other dimensions than the channels'."""
    before, after = len(walk.shapes[node.all_input_nodes[0]]), len(walk.shapes[node])
    given = options(node, "input", "dim", "keepdim")
    dims = given.get("dim")
    dims = (dims,) if isinstance(dims, int) else dims
    if not dims or not all(isinstance(d, int) for d in dims) or given.keys() - {"input", "dim", "keepdim"}:
        return barrier(walk, node, module)
    dims = {d % before for d in dims}
    if wire.dim in dims:
        return barrier(walk, node, module)
    return wire._replace(dim=wire.dim if after == before else wire.dim - sum(d < wire.dim for d in dims))


def concatenate(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Along the channels: one after the other. Along another dimension: constant where both are, and alike."""
    given = options(node, "tensors", "dim")
    tensors, at = given.get("tensors"), given.get("dim", given.get("axis", 0))
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, fx.Node) and t in walk.shapes for t in tensors):
        return barrier(walk, node, module)
    dims = {wire.dim for t in tensors if (wire := walk.wires[t]) is not None}
    n = len(walk.shapes[node])
    if len(dims) != 1 or not isinstance(at, int) or {len(walk.shapes[t]) for t in tensors} != {n}:
        return barrier(walk, node, module)
    (dim,) = dims
    wires = [walk.at(t, dim) for t in tensors]
    if at % n == dim:
        ids, constant, value = (torch.cat(parts) for parts in zip(*(wire[1:] for wire in wires), strict=True))
        return Wire(dim, ids, constant, value)
    first = wires[0]
    walk.pairs += [(first.ids, other.ids) for other in wires[1:]]
    alike = torch.stack([w.constant & (w.value == first.value) for w in wires]).all(0)
    return walk.emit(dim, first.ids, alike, first.value)
