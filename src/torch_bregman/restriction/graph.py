"""Which channels of a network can be left out when units are zero, and the constants that stand in for them.

A unit whose weights are all zero emits its bias, for every sample and at every position. `Graph` follows such constants
through the traced network, one `Wire` per tensor. Channels that only exist together (the two sides of a sum, the input
and the output of a norm) share an id; an id goes if all its channels are constant and no operation needs them.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from .attention import Attention


class Untraceable(ValueError):  # noqa: N818 - it says what the network is
    """The network cannot be followed by torch.fx."""


@dataclass(frozen=True, eq=False)
class Cut:
    """What remains of a module. Indices are int64, sorted, on the CPU.

    Attributes:
        outputs: the outputs that remain.
        alive: those of `outputs` whose rows are trained; of a norm, all.
        inputs: the inputs that remain; None for a module that works channel by channel.
        constant: what the removed inputs contribute to `outputs`: [len(outputs)], or [len(outputs), *positions] where
            a zero padding makes it depend on the position; None if it is zero.
        fed: the constants of the inputs that were left out, in their order (float64).
        steady: of a norm, the constant that every removed channel takes in (float64; 0 elsewhere).
    """

    outputs: Tensor
    alive: Tensor
    inputs: Tensor | None = None
    constant: Tensor | None = None
    fed: Tensor | None = None
    steady: Tensor | None = None


@contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Inside, no gradients; afterwards attributes, training flags, buffers and random numbers are what they were."""
    modules = {id(m): m for model in models for m in model.modules()}.values()
    attributes = [(m, dict(m.__dict__), dict(m._buffers)) for m in modules]
    values = [(b, b.clone()) for _, _, buffers in attributes for b in buffers.values() if b is not None]
    devices = {t.device for m in models for t in [*m.parameters(), *m.buffers()] if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
        try:
            yield
        finally:
            for module, members, buffers in attributes:
                module.__dict__.clear()
                module.__dict__.update(members)
                module._buffers.clear()
                module._buffers.update(buffers)
            for buffer, before in values:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def still(*models: nn.Module, norms: bool = True) -> None:
    """Dropout (and norms) in eval mode: no noise, and no demands on the batch."""
    kinds = (_DropoutNd, _NormBase) if norms else (_DropoutNd,)
    for model in models:
        for module in model.modules():
            if isinstance(module, kinds):
                module.training = False


# ---- tracing


class _Tracer(fx.Tracer):
    """Stock modules are leaves, but an encoder layer has hidden units of its own: it is followed step by step."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Attention) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if type(m) is nn.TransformerEncoderLayer and not _hooked(m):
            return _encoder_layer(m, *args, **kwargs)
        # With masks the encoder looks at their values.
        if type(m) is nn.TransformerEncoder and not _hooked(m) and len(args) == 1 and not kwargs:
            (x,) = args
            for layer in m.layers:
                x = layer(x)
            return x if m.norm is None else m.norm(x)
        return super().call_module(m, forward, args, kwargs)


def _encoder_layer(
    m: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    """nn.TransformerEncoderLayer.forward without its tests of the input, which torch.fx cannot follow."""

    def attention(x: Any) -> Any:
        return m._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

    if m.norm_first:
        x = src + attention(m.norm1(src))
        return x + m._ff_block(m.norm2(x))
    x = m.norm1(src + attention(src))
    return m.norm2(x + m._ff_block(x))


class _Shapes(fx.Interpreter):
    """Runs the traced graph and notes the shape of every tensor in it."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


class Trace(NamedTuple):
    nodes: list[fx.Node]
    shapes: dict[fx.Node, tuple[int, ...]]
    whole: set[str]  # modules that must stay as they are


def _trace(model: nn.Module, inputs: tuple[Tensor, ...]) -> Trace:
    if patched := [name or "the model" for name, m in model.named_modules() if "forward" in m.__dict__]:
        raise Untraceable(f"{patched[0]} has a `forward` of its own instead of its class's; expected a plain module.")
    with untouched(model):
        try:
            parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
            fixed = {p.name: p.default for p in parameters if p.default is not p.empty}
            graph = _Tracer().trace(model, concrete_args=fixed or None)
            still(model)
            interpreter = _Shapes(model, graph)
            with torch.random.fork_rng(devices=[x.device for x in inputs if x.device.type == "cuda"]):
                traced = interpreter.run(*[x.clone() for x in inputs], enable_io_processing=False)
            actual = model(*[x.clone() for x in inputs])
        except Exception as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            raise Untraceable(
                f"{type(model).__name__} cannot be traced by torch.fx on these inputs ({reason})."
            ) from error
        # An operation in place that the trace shows as a new tensor, or state that changes from call to call.
        if not all(map(_close, tree_leaves(traced), tree_leaves(actual))):
            raise Untraceable(f"{type(model).__name__} as traced by torch.fx does not compute what the model computes.")
    return Trace(list(graph.nodes), interpreter.shapes, _whole(model, graph))


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or not a.is_floating_point():
        return True
    scale = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0.0
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _whole(model: nn.Module, graph: fx.Graph) -> set[str]:
    """Modules whose weights have another use than one plain call: called twice, tied, read by the network, hooked."""
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return read | {
        name
        for name, module in model.named_modules()
        if _hooked(module)
        or any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None)
        or (calls[name] > 1 and (module._parameters or module._buffers))
    }


# ---- one walk through the trace


class Wire(NamedTuple):
    """The channels of a tensor: the dimension they lie in, their ids, which are constant, and the constants (float64).

    Everything is on the CPU, where thousands of numbers cost less than one kernel launch.
    """

    dim: int
    ids: Tensor
    constant: Tensor
    value: Tensor


class Call(NamedTuple):
    """A module that may be cut, the wires into it and out of it, and its units that live."""

    name: str
    module: nn.Module
    source: Wire
    output: Wire
    alive: Tensor
    positions: tuple[int, ...]

    def cut(self, removed: Tensor) -> Cut | None:
        """What remains once the ids marked in `removed` are gone; None if that is everything."""
        gone = removed[self.output.ids]
        outputs = (~gone).nonzero().view(-1)
        if isinstance(self.module, _BatchNorm):
            steady = self.source.value.where(gone, 0.0)
            return Cut(outputs, outputs, steady=steady) if gone.any() else None
        alive = (~gone & self.alive).nonzero().view(-1)
        if getattr(self.module, "groups", 1) > 1:
            return Cut(outputs, alive) if len(alive) < len(gone) else None
        lost = removed[self.source.ids]
        if len(alive) == len(gone) and not lost.any():
            return None
        constant = self._constant(outputs, lost & (self.source.value != 0))
        return Cut(outputs, alive, (~lost).nonzero().view(-1), constant, self.source.value[lost])

    @torch.no_grad()
    def _constant(self, outputs: Tensor, lost: Tensor) -> Tensor | None:
        if not lost.any():
            return None
        module: Any = self.module
        weight = module.weight
        at = lost.nonzero().view(-1)
        values = self.source.value[at].to(weight)
        weight = weight.index_select(1, at.to(weight.device)).index_select(0, outputs.to(weight.device))
        if weight.dim() == 2 or not padded(module):
            return weight.flatten(2).sum(2) @ values if weight.dim() > 2 else weight @ values
        constant = constant_image(module, weight, values, self.positions)
        first = constant.flatten(1)[:, 0]
        return first if bool((constant.flatten(1) == first[:, None]).all()) else constant


def constant_image(module: Any, weight: Tensor, values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """What a convolution makes of inputs [*positions] that are constant: [out, *output positions]."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(positions) - 1]
    image = values.view(1, -1, *[1] * len(positions)).expand(1, -1, *positions)
    return convolve(image, weight, None, module.stride, module.padding, module.dilation)[0]


def padded(module: Any) -> bool:
    """Whether a convolution sees zeros beyond the border; the other paddings continue a constant."""
    if isinstance(module, _ConvTransposeNd):  # positions are reached by different parts of the kernel
        return True
    padding = module.padding
    return module.padding_mode == "zeros" and (padding == "same" or (padding != "valid" and _some(padding, 0)))


class Walk:
    """The wires of all tensors, for given live units."""

    rules: Mapping[type, Rule]

    def __init__(self, model: nn.Module, trace: Trace, alive: Mapping[str, Tensor]) -> None:
        self.modules = dict(model.named_modules())
        self.shapes = trace.shapes
        self.whole = trace.whole
        self.alive = alive
        self.wires: dict[fx.Node, Wire | None] = {}
        self.calls: list[Call] = []
        self.count = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.held: list[Tensor] = []
        for node in trace.nodes:
            rule, module = self.rule(node)
            self.node, self.module = node, module
            self.wires[node] = rule(self, node, module)

    def rule(self, node: fx.Node) -> tuple[Rule, Any]:
        """What is known about the operation of a node, and its module if it has one."""
        if node.op in ("placeholder", "get_attr"):
            return _nothing, None
        if node.op == "call_method":
            rule = METHODS.get(str(node.target), barrier)
        elif node.op == "call_function":
            rule = FUNCTIONS.get(node.target, barrier)
        elif node.op == "call_module" and node.target not in self.whole:
            module = self.modules[str(node.target)]
            rule = self.rules.get(type(module), barrier)
            return (rule if node in self.shapes else barrier), module
        else:
            rule = barrier
        return (rule if node in self.shapes or rule in (_sizes, _nothing) else barrier), None

    def new(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count)

    def hold(self, ids: Tensor) -> None:
        """The operation at hand needs these channels."""
        self.held.append(ids)

    def vary(self, ids: Tensor) -> None:
        """These channels are not constant."""
        self.held.append(ids)

    def units(self, name: str, module: Any, wire: Wire) -> tuple[Tensor, Tensor, Tensor]:
        """Which units of a layer live, which emit a constant, and that constant."""
        alive = self.alive.get(name)
        alive = torch.ones(len(module.weight), dtype=torch.bool) if alive is None else alive.cpu()
        bias = torch.zeros(len(alive)).double() if module.bias is None else numbers(module.bias)
        if getattr(module, "groups", 1) == 1:
            return alive, ~alive, bias
        return (alive, *constants(module, wire, alive, bias, trained=True))

    def emit(self, dim: int, ids: Tensor, constant: Tensor, value: Tensor) -> Wire:
        """A wire; ids that have a channel which is not constant stay."""
        constant = constant & value.isfinite()
        self.vary(ids[~constant])
        return Wire(dim, ids, constant, value.double().where(constant, 0.0))

    def at(self, node: fx.Node, dim: int) -> Wire:
        """The wire of a tensor whose channels are to lie in `dim`: if they do not, all of them stay."""
        wire = self.wires[node]
        if wire is not None and wire.dim == dim:
            return wire
        if wire is not None:
            self.hold(wire.ids)
        n = self.shapes[node][dim]
        ids = self.new(n)
        self.hold(ids)
        return Wire(dim, ids, torch.zeros(n, dtype=torch.bool), torch.zeros(n).double())

    def aligned(self, nodes: list[fx.Node]) -> list[Wire] | None:
        """The wires of tensors whose channels correspond one to one, or None if they do not (or none has a wire)."""
        dims = {wire.dim for n in nodes if (wire := self.wires[n]) is not None}
        shapes = [self.shapes.get(n) for n in nodes]
        if len(dims) != 1 or not all(shape and len(shape) == len(shapes[0] or ()) for shape in shapes):
            return None
        (dim,) = dims
        if len({shape[dim] for shape in shapes if shape}) != 1:
            return None
        wires = [self.at(n, dim) for n in nodes]
        self.pairs += [(wires[0].ids, other.ids) for other in wires[1:]]
        return wires

    def removed(self) -> Tensor:
        """Which ids go."""
        label = components(self.count, self.pairs)
        held = torch.zeros(self.count, dtype=torch.bool)
        for ids in self.held:
            held[label[ids]] = True
        for call in self.calls:
            ids = label[call.output.ids]
            if not held[ids].any():  # a layer without outputs would be no layer
                held[ids[:1]] = True
        return ~held[label]


def components(n: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of n ids the smallest that it is connected with."""
    label = torch.arange(n)
    if not pairs:
        return label
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    while not torch.equal(label[a], label[b]):
        low = torch.minimum(label[a], label[b])
        # The labels themselves are joined as well as the ids: chains then shrink by half, not by one.
        for target in (label[a], label[b], a, b):
            label = label.scatter_reduce(0, target, low, "amin")
        label = label[label]
    return label


# ---- rules: (walk, node, module or None) → the wire of the result, or None: a tensor from which nothing goes

Rule = Callable[[Walk, fx.Node, Any], "Wire | None"]


def _nothing(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    return None


def barrier(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Everything that goes in stays."""
    for n in node.all_input_nodes:
        if (wire := walk.wires[n]) is not None:
            walk.hold(wire.ids)
    return None


def options(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name; `names` are those that may come by position."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def only_input(walk: Walk, node: fx.Node) -> Wire | None:
    """The wire of the first argument, if it is a tensor with a wire."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return walk.wires[first] if isinstance(first, fx.Node) else None


def channelwise(rule: Callable[[Walk, fx.Node, Any, Wire], Wire | None]) -> Rule:
    """A rule that only has something to say about the wire of the first argument."""

    def wrapped(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        wire = only_input(walk, node)
        return barrier(walk, node, module) if wire is None else rule(walk, node, module, wire)

    return wrapped


@channelwise
def _same(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    return wire


def layer(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Linear and convolutions: a unit that does not live emits its bias."""
    if len(node.args) != 1 or node.kwargs:
        return barrier(walk, node, module)
    (source,) = node.all_input_nodes
    shape = walk.shapes[source]
    convolution = isinstance(module, _ConvNd)
    dim = 1 if convolution else len(shape) - 1
    groups = module.groups if convolution else 1
    if groups > 1 and isinstance(module, _ConvTransposeNd):
        return barrier(walk, node, module)
    if convolution and len(shape) != 2 + len(module.kernel_size):
        return barrier(walk, node, module)
    wire = walk.at(source, dim)
    alive, constant, value = walk.units(str(node.target), module, wire)
    if groups == 1:
        ids = walk.new(len(alive))
    else:  # a group goes with all its inputs and outputs, or stays
        own = wire.ids.view(groups, -1)
        walk.pairs += [(own[:, 0], other) for other in own.T[1:]]
        ids = own[:, :1].expand(groups, len(module.weight) // groups).reshape(-1)
    output = walk.emit(dim, ids, constant, value)
    walk.calls.append(Call(str(node.target), module, wire, output, alive, shape[2:]))
    return output


def oriented(module: Any) -> Tensor:
    """The weight of a layer as [outputs, inputs, *kernel]."""
    weight = module.weight.detach()
    return weight.transpose(0, 1) if isinstance(module, _ConvTransposeNd) else weight


def constants(module: Any, wire: Wire, alive: Tensor, bias: Tensor, *, trained: bool) -> tuple[Tensor, Tensor]:
    """Which units of a Linear or a convolution are constant, and what they emit.

    `alive`: those that have a weight; `bias`: what they emit without inputs; `trained`: weights
    that are zero may change.
    """
    weight = numbers(oriented(module))
    groups = getattr(module, "groups", 1)
    weight = weight.reshape(groups, len(weight) // groups, *weight.shape[1:])  # [groups, out, in, *kernel]
    sums = weight[..., None].flatten(3).sum(3)
    reads = torch.ones_like(sums, dtype=torch.bool) if trained else (weight != 0)[..., None].flatten(3).any(3)
    known, value = wire.constant.view(groups, 1, -1), wire.value.view(groups, 1, -1)
    if weight.dim() > 3 and padded(module):  # at the border it is another one
        known = known & (value == 0)
    constant = ~(reads & ~known).any(2).view(-1)
    total = bias + torch.where(known, sums * value, 0.0).sum(2).view(-1)
    return constant | ~alive, torch.where(alive, total, bias)


def numbers(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


@channelwise
def _norm(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """BatchNorm: a constant channel becomes its shift, or what the running statistics make of it."""
    if wire.dim != 1:
        return barrier(walk, node, module)
    n = len(wire.ids)
    weight = torch.ones(n).double() if module.weight is None else numbers(module.weight)
    bias = torch.zeros(n).double() if module.bias is None else numbers(module.bias)
    value = bias
    if not module.training and module.running_mean is not None:
        mean, variance = numbers(module.running_mean), numbers(module.running_var)
        value = weight * (wire.value - mean) / (variance + module.eps).sqrt() + bias
    output = walk.emit(1, wire.ids, wire.constant, value)
    alive = torch.ones(n, dtype=torch.bool)
    walk.calls.append(Call(str(node.target), module, wire, output, alive, ()))
    return output


def pointwise(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """f(x), x + y, ...: of constants, a constant."""
    nodes = node.all_input_nodes
    wires = None if "out" in node.kwargs or not _harmless(walk, node, module) else walk.aligned(nodes)
    if wires is None:
        return barrier(walk, node, module)
    values = {n: wire.value.clone() for n, wire in zip(nodes, wires, strict=True)}
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    if module is not None:
        value = module.forward(*args, **kwargs)
    elif node.op == "call_method":
        value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    constant = torch.stack([wire.constant for wire in wires]).all(0)
    return walk.emit(wires[0].dim, wires[0].ids, constant, value)


def _harmless(walk: Walk, node: fx.Node, module: Any) -> bool:
    """Whether nobody else sees what the operation writes in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv") or getattr(module, "inplace", False)
    if not in_place and not node.kwargs.get("inplace") and not any(arg is True for arg in node.args):
        return True
    first = node.all_input_nodes[0]
    return len(first.users) == 1 and walk.rule(first)[0] in (layer, _norm, pointwise)


def _dropout(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Zeros stay zeros; other constants only where nothing is dropped."""
    given = options(node, "input", "p", "training")
    p, training = (module.p, module.training) if module else (given.get("p", 0.5), given.get("training", True))
    return _same(walk, node, module) if p == 0 or not training else _zeros(walk, node, module)


@channelwise
def _zeros(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    return walk.emit(wire.dim, wire.ids, wire.constant & (wire.value == 0), wire.value)


_AVERAGE = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAXIMUM = ("input", "kernel_size", "stride", "padding", "dilation")


def _pool(spatial: int, names: tuple[str, ...], walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """Pooling over the last `spatial` dimensions: constants stay what they are."""
    wire = only_input(walk, node)
    if wire is None or wire.dim != len(walk.shapes[node]) - spatial - 1:
        return barrier(walk, node, module)
    given = {name: getattr(module, name, None) for name in names} if module else options(node, *names)
    padded = _some(given.get("padding"), 0)
    if padded and _some(given.get("dilation"), 1):  # a window may lie outside altogether
        return barrier(walk, node, module)
    if given.get("divisor_override") is not None or (padded and given.get("count_include_pad", names is _AVERAGE)):
        return _zeros(walk, node, module)
    return wire


def _some(option: Any, usual: int) -> bool:
    """Whether an option per dimension is, in one of them, not the usual one."""
    if option is None:
        return False
    return any(o != usual for o in option) if isinstance(option, tuple | list) else option != usual


@channelwise
def _interpolate(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    names = ("input", "size", "scale_factor", "mode")
    mode = module.mode if module else options(node, *names).get("mode", "nearest")
    # The weights of the other modes do not sum to one exactly.
    exact = mode in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear") and wire.dim == 1
    return wire if exact else barrier(walk, node, module)


@channelwise
def _mean(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
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


@channelwise
def _flatten(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    given = vars(module) if module else options(node, "input", "start_dim", "end_dim")
    start, end = given.get("start_dim", 0), given.get("end_dim", -1)
    if not (isinstance(start, int) and isinstance(end, int)):
        return barrier(walk, node, module)
    return merged(walk, node, module, wire, start, end)


@channelwise
def view(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """x.view(x.size(0), -1) and the like; where a size is written as a number, the channels cannot change it."""
    before, after = walk.shapes[node.all_input_nodes[0]], walk.shapes[node]
    sizes = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list):
        sizes = tuple(sizes[0])
    last = len(after) - 1
    if node.kwargs or len(sizes) != len(after) or after[:last] != before[:last] or not last <= wire.dim:
        return barrier(walk, node, module)
    if not isinstance(sizes[-1], int) or sizes[-1] != -1:
        return barrier(walk, node, module)
    return merged(walk, node, module, wire, last, len(before) - 1)


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
def _permute(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    dims = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], tuple | list) else node.args[1:]
    n = len(walk.shapes[node])
    if node.kwargs or len(dims) != n or not all(isinstance(d, int) for d in dims):
        return barrier(walk, node, module)
    return wire._replace(dim=[d % n for d in dims].index(wire.dim))  # type: ignore[operator]


@channelwise
def _unsqueeze(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    dim = options(node, "input", "dim").get("dim")
    if not isinstance(dim, int):
        return barrier(walk, node, module)
    return wire._replace(dim=wire.dim + (dim % len(walk.shapes[node]) <= wire.dim))


@channelwise
def _squeeze(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """Of single dimensions that are named; without, those of the channels or samples might go."""
    dim = options(node, "input", "dim").get("dim")
    before = walk.shapes[node.all_input_nodes[0]]
    if not isinstance(dim, int) or dim % len(before) == wire.dim:
        return barrier(walk, node, module)
    gone = before[dim % len(before)] == 1 and dim % len(before) < wire.dim
    return wire._replace(dim=wire.dim - gone)


@channelwise
def _item(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    """x[:, :, None, 0] and the like, where all channels are taken."""
    keys = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    before = after = 0
    for key in keys:
        if key is None:
            after += 1
        elif isinstance(key, slice | int) and before != wire.dim:
            before, after = before + 1, after + isinstance(key, slice)
        elif key == slice(None):
            return wire._replace(dim=after)
        else:
            return barrier(walk, node, module)
    return wire._replace(dim=wire.dim + after - before)


@channelwise
def _transpose(walk: Walk, node: fx.Node, module: Any, wire: Wire) -> Wire | None:
    given = options(node, "input", "dim0", "dim1")
    n = len(walk.shapes[node])
    a, b = given.get("dim0"), given.get("dim1")
    if not (isinstance(a, int) and isinstance(b, int)):
        return barrier(walk, node, module)
    a, b = a % n, b % n
    return wire._replace(dim={a: b, b: a}.get(wire.dim, wire.dim))


def _cat(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
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


def _sizes(walk: Walk, node: fx.Node, module: Any) -> Wire | None:
    """x.size(), x.shape, x.dtype, ...: a number of channels that is read must stay what it is."""
    wire = only_input(walk, node)
    if wire is None:
        return None
    what = node.args[1] if node.target is getattr else node.target
    n = len(walk.shapes[node.all_input_nodes[0]])
    if what in ("dtype", "device", "ndim", "dim"):
        return None
    if what == "size" and len(node.args) + len(node.kwargs) == 2:
        read = [options(node, "input", "dim").get("dim")]
    elif what in ("size", "shape") and all(user.target is operator.getitem for user in node.users):
        read = [user.args[1] for user in node.users]
    else:
        return barrier(walk, node, module)
    return barrier(walk, node, module) if any(_reads(key, wire.dim, n) for key in read) else None


def _reads(key: Any, dim: int, n: int) -> bool:
    """Whether sizes[key] is, or holds, the size of dimension `dim` of n."""
    if isinstance(key, slice) and all(x is None or isinstance(x, int) for x in (key.start, key.stop, key.step)):
        return dim in range(n)[key]
    return not isinstance(key, int) or key % n == dim


_POINTWISE = [
    "relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_", "celu", "celu_", "gelu",
    "silu", "mish", "sigmoid", "sigmoid_", "tanh", "tanh_", "softplus", "softsign", "hardtanh", "hardtanh_",
    "hardswish", "hardsigmoid", "logsigmoid", "tanhshrink", "softshrink", "hardshrink", "abs", "abs_", "absolute",
    "neg", "neg_", "negative", "exp", "exp_", "expm1", "log", "log1p", "sqrt", "sqrt_", "rsqrt", "reciprocal",
    "square", "sin", "cos", "erf", "add", "add_", "sub", "sub_", "subtract", "mul", "mul_", "multiply", "div", "div_",
    "divide", "true_divide", "pow", "clamp", "clamp_", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "lerp",
    "addcmul", "addcdiv", "clone",
]  # fmt: skip
_OPERATORS = ["add", "sub", "mul", "truediv", "pow", "neg", "pos", "abs", "iadd", "isub", "imul", "itruediv"]
_ACTIVATIONS = [
    "ReLU", "ReLU6", "LeakyReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh", "Softplus",
    "Softsign", "Hardtanh", "Hardswish", "Hardsigmoid", "LogSigmoid", "Tanhshrink", "Softshrink", "Hardshrink",
    "Threshold",
]  # fmt: skip


def _named(where: Any, rules: Mapping[str, Rule]) -> dict[Any, Rule]:
    return {found: rule for name, rule in rules.items() if (found := getattr(where, name, None)) is not None}


_POOLS: dict[str, Rule] = {
    name.format(d): partial(_pool, d, _AVERAGE if name.startswith("avg") else _MAXIMUM)
    for d in (1, 2, 3)
    for name in ("max_pool{}d", "avg_pool{}d", "adaptive_max_pool{}d", "adaptive_avg_pool{}d")
}
_SHARED: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, pointwise),
    "mean": _mean, "amax": _mean, "amin": _mean,
    "flatten": _flatten, "reshape": view, "permute": _permute, "transpose": _transpose,
    "unsqueeze": _unsqueeze, "squeeze": _squeeze,
    "detach": _same,
}  # fmt: skip
METHODS: dict[str, Rule] = {
    **_SHARED, "view": view, "size": _sizes, "dim": _sizes,
    "contiguous": _same, "float": _same, "double": _same,
}  # fmt: skip
FUNCTIONS: dict[Any, Rule] = {
    **_named(torch, {**_SHARED, **_POOLS, "cat": _cat, "concat": _cat, "concatenate": _cat}),
    **_named(F, {**dict.fromkeys(_POINTWISE, pointwise), **_POOLS}),
    **_named(operator, dict.fromkeys(_OPERATORS, pointwise)),
    F.dropout: _dropout, F.dropout1d: _dropout, F.dropout2d: _dropout, F.dropout3d: _dropout,
    F.interpolate: _interpolate, getattr: _sizes, operator.getitem: _item,
}  # fmt: skip
MODULES: dict[type, Rule] = {
    **_named(nn, dict.fromkeys(_ACTIVATIONS, pointwise)),
    **_named(nn, {"".join(map(str.capitalize, n.split("_"))): rule for n, rule in _POOLS.items()}),
    nn.Linear: layer, nn.Conv1d: layer, nn.Conv2d: layer, nn.Conv3d: layer,
    nn.BatchNorm1d: _norm, nn.BatchNorm2d: _norm, nn.BatchNorm3d: _norm,
    nn.Dropout: _dropout, nn.Dropout1d: _dropout, nn.Dropout2d: _dropout, nn.Dropout3d: _dropout,
    nn.Identity: _same, nn.Flatten: _flatten, nn.Upsample: _interpolate,
}  # fmt: skip


Walk.rules = MODULES


class Graph:
    """A network as torch.fx sees it, for `cut`.

    The modules of torch.nn are leaves; of an `nn.TransformerEncoderLayer` the parts are. Nothing about the model
    changes: no parameter, buffer, training flag or random number.

    What the network computes in Python from `in_features`, `outchannelwise` and the like of its own layers is not seen.

    Args:
        model: the network.
        example_inputs: what its forward takes, in order; arguments beyond keep their defaults. The spatial sizes are
            those of all later inputs, the batch size need not be.

    Raises:
        Untraceable: torch.fx cannot follow the network, or finds another function than it computes.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Tensor, ...]) -> None:
        self.model = model
        self.example_inputs = tuple(example_inputs)
        self._traces: dict[tuple[bool, ...], Trace] = {}
        self.traced()

    def traced(self) -> Trace:
        # A forward may look at `self.training`: each combination of flags has a trace of its own.
        flags = tuple(module.training for module in self.model.modules())
        if flags not in self._traces:
            self._traces[flags] = _trace(self.model, self.example_inputs)
        return self._traces[flags]

    def cut(self, alive: Mapping[str, Tensor]) -> dict[str, Cut]:
        """What can be left out, per module that loses outputs, inputs or live rows, in the model's present mode.

        In training mode a constant channel leaves a BatchNorm as its shift, in eval mode as the running statistics
        have it; each norm's own flag counts.

        Args:
            alive: for names of Linear and Conv modules, which units live: bool [out]. The weights of the others must
                be zero. In modules that are not named all units live.

        Raises:
            ValueError: a name that is no Linear or Conv, a mask that does not fit, or a nonzero weight in a unit that
                is said not to live.
        """
        for name, mask in alive.items():
            self._check(name, mask)
        walk = Walk(self.model, self.traced(), alive)
        removed = walk.removed()
        cuts = {call.name: call.cut(removed) for call in walk.calls}
        return {name: cut for name, cut in cuts.items() if cut is not None}

    def _check(self, name: str, mask: Tensor) -> None:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"`alive` names {name!r}; the model has no such module.") from None
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise ValueError(f"`alive` names {name!r}, a {type(module).__name__}; expected Linear or Conv1d, 2d, 3d.")
        weight = module.weight.detach()
        if mask.dtype != torch.bool or tuple(mask.shape) != (len(weight),):
            raise ValueError(
                f"`alive` of {name!r} is {mask.dtype} {tuple(mask.shape)}; expected bool ({len(weight)},)."
            )
        if weight[~mask.to(weight.device)].any():
            raise ValueError(f"`alive` of {name!r} leaves out units whose weights are not zero.")
