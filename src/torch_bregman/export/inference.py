"""`optimize_for_inference`: every layer dense or sparse, whichever measured faster, and chains of layers in one call.

A chain (Linear or Conv2d, its activation and pooling, the next Linear …) whose layers all measured faster sparse
becomes a `Chain`: tables of its live weights, and one call of a compiled loop for the whole of it.
"""

from __future__ import annotations

import copy
import ctypes
import math
import operator
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils._pytree import tree_leaves

from .. import kernels
from ..kernels import threads
from .shrink import compact

TOLERANCE = 1e-5  # of the largest output
MARGIN = 0.97  # a way is taken if it needs less than this share of the other's time: nearer is noise
SECONDS = 0.2  # spent on one comparison
ALONE = 1 << 16  # multiplications of a vector that are over before a second thread has woken up
FULL = 0.2  # density from which a column is stored with its zeros: they cost less than indices
ROOM = 1 << 28  # bytes of activations of one piece, beyond which a layer stays dense
WAYS = ("columns", "panels of 1", "panels of 2", "panels of 4")

Pair = tuple[int, int]


class Unfit(Exception):  # noqa: N818 - it says what the layer is
    """A module that no chain takes, and why."""


@dataclass(frozen=True)
class LayerChoice:
    """How one Linear or Conv2d computes, and the seconds that decided; None where it was not measured."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense: float | None
    sparse: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class InferenceReport:
    """What was chosen and why. `dense` and `seconds`: of the given network and of the result, for `batch` samples."""

    layers: tuple[LayerChoice, ...]
    batch: int
    threads: int
    dense: float
    seconds: float
    result: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("layer", "weight", "density", "dense µs", "sparse µs", "chosen", "why")
        rows = [
            (c.name, "×".join(map(str, c.shape)), f"{c.density:.1%}", _microseconds(c.dense), _microseconds(c.sparse),
             c.chosen, c.why)
            for c in self.layers
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        left = (True, True, False, False, False, True, True)
        lines = [
            "  ".join(f"{t:<{w}}" if at else f"{t:>{w}}" for t, w, at in zip(row, widths, left, strict=True)).rstrip()
            for row in (head, *rows)
        ]
        whole = (
            f"batch {self.batch}, {self.threads} threads: dense {_microseconds(self.dense)} µs, "
            f"this {_microseconds(self.seconds)} µs"
        )
        gain = (
            f"{self.dense / self.seconds:.2f} times as fast: {self.result}"
            if self.seconds < self.dense
            else self.result
        )
        return "\n".join([*lines, f"{whole}, {gain}", *self.notes])


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"


# ---- The layers that a chain can be made of


@dataclass
class _Layer:
    """A Linear or Conv2d and what follows it up to the next: `modules` is the same in torch's own words."""

    name: str
    modules: list[nn.Module]
    weight: Tensor
    bias: Tensor
    source: tuple[int, ...]  # of a sample
    result: tuple[int, ...]
    image: tuple[int, int, int]  # what the convolution gives before pooling; (out, 1, 1) of a Linear
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pool: tuple[Pair, Pair, Pair] | None = None
    pooled: tuple[int, int, int] = (0, 0, 0)
    bounds: tuple[float, float, float] = (-math.inf, math.inf, 0.0)  # and the slope of a leaky ReLU
    curve: str = "NONE"
    active: bool = False
    nodes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        return torch.count_nonzero(self.weight).item() / max(1, self.weight.numel())


def _begin(name: str, module: nn.Module, shape: tuple[int, ...]) -> _Layer:
    """The layer that `module` begins for samples of this shape; `Unfit` where there is none."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        raise Unfit(f"{type(module).__name__} begins no chain")
    if _hooked(module):
        raise Unfit("the module has hooks")
    assert isinstance(module, nn.Linear | nn.Conv2d)
    weight = module.weight.detach()
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise Unfit(f"the weight is {weight.dtype} on {weight.device}; the kernels need float32 on a CPU")
    if not weight.isfinite().all():
        raise Unfit("the weight is not finite")
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()
    if isinstance(module, nn.Linear):
        if shape != (module.in_features,):
            raise Unfit("the input is no matrix")
        out = module.out_features
        return _Layer(name, [module], weight, bias, shape, (out,), (out, 1, 1), pooled=(out, 1, 1))
    kernel, stride, dilation = _pair(module.kernel_size), _pair(module.stride), _pair(module.dilation)
    if module.padding_mode != "zeros" or len(shape) != 3 or shape[0] != module.in_channels:
        raise Unfit(f"{module.padding_mode} padding" if module.padding_mode != "zeros" else "the input is no image")
    if isinstance(module.padding, str):
        around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)] if module.padding == "same" else [0, 0]
        if any(n % 2 for n in around):
            raise Unfit("the padding is not the same on both sides")
        padding = around[0] // 2, around[1] // 2
    else:
        padding = _pair(module.padding)
    image = (module.out_channels, *_positions(shape[1:], kernel, stride, padding, dilation))
    return _Layer(
        name, [module], weight, bias, shape, image, image, stride, padding, dilation, module.groups, pooled=image
    )


def _follow(layer: _Layer, module: nn.Module) -> None:
    """Let the layer do what `module` does to its result; `Unfit` where it cannot."""
    if _hooked(module):
        raise Unfit("the module has hooks")
    if isinstance(module, (nn.Dropout, nn.Identity)):
        pass
    elif type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim in (-1, len(layer.result)):
        layer.result = (math.prod(layer.result),)
    elif type(module) is nn.MaxPool2d:
        kernel = _pair(module.kernel_size)
        stride, padding = _pair(kernel if module.stride is None else module.stride), _pair(module.padding)
        if layer.pool or len(layer.result) != 3 or _pair(module.dilation) != (1, 1):
            raise Unfit("this pooling is not fused")
        if module.ceil_mode or module.return_indices or layer.curve in ("SILU", "GELU") or layer.bounds[2] < 0:
            raise Unfit("this pooling is not fused")
        layer.pool = kernel, stride, padding
        layer.pooled = (layer.image[0], *_positions(layer.image[1:], kernel, stride, padding))
        layer.result = layer.pooled
    elif type(module) in ACTIVATIONS and not layer.active:
        layer.curve, layer.bounds = ACTIVATIONS[type(module)](module)
        layer.active = True
    else:
        raise Unfit(f"{type(module).__name__} is not fused")
    layer.modules.append(module)


def _clamped(low: float, high: float) -> tuple[str, tuple[float, float, float]]:
    return "NONE", (low, high, 0.0)


def _curved(name: str, slope: float = 0.0) -> tuple[str, tuple[float, float, float]]:
    return name, (-math.inf, math.inf, slope)


def _gelu(module: Any) -> tuple[str, tuple[float, float, float]]:
    if module.approximate != "none":
        raise Unfit("this GELU is not fused")
    return _curved("GELU")


ACTIVATIONS: dict[type[nn.Module], Callable[[Any], tuple[str, tuple[float, float, float]]]] = {
    nn.ReLU: lambda m: _clamped(0.0, math.inf),
    nn.ReLU6: lambda m: _clamped(0.0, 6.0),
    nn.Hardtanh: lambda m: _clamped(m.min_val, m.max_val),
    nn.LeakyReLU: lambda m: _curved("LEAKY", m.negative_slope),
    nn.Sigmoid: lambda m: _curved("SIGMOID"),
    nn.Tanh: lambda m: _curved("TANH"),
    nn.SiLU: lambda m: _curved("SILU"),
    nn.GELU: _gelu,
}


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _positions(size: Iterable[int], kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> Pair:
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    return h, w


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _layers(modules: list[nn.Module], shape: tuple[int, ...]) -> list[_Layer]:
    """The modules one after the other as layers; `Unfit` if they are no chain."""
    found: list[_Layer] = []
    before: list[nn.Module] = []
    for module in modules:
        if type(module) in (nn.Linear, nn.Conv2d):
            found.append(_begin("", module, found[-1].result if found else shape))
            found[-1].modules[:0], before = before, []
        elif found:
            _follow(found[-1], module)
        elif type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim in (-1, len(shape)):
            shape = (math.prod(shape),)
            before.append(module)
        else:
            raise Unfit(f"{type(module).__name__} begins no chain")
    return found


# ---- A chain


class Chain(nn.Module):
    """Layers one after the other, on their live weights alone: a snapshot, for inference.

    What it was not built for (another dtype, device or size of image, or an input that asks for a gradient) goes
    through the same layers in torch.

    Args:
        modules: Linear and Conv2d with what is fused to them.
        shape: of a sample.
        way: one of `WAYS`: sample by sample, or so many vectors of 16 samples at a time.
        spread: over torch's threads, where there is enough to do.

    Raises:
        Unfit: modules that are no chain, or too large for this way.
    """

    def __init__(self, modules: list[nn.Module], shape: tuple[int, ...], way: str, spread: bool = True) -> None:
        super().__init__()
        from ..kernels import inference as kernel

        self.dense = nn.Sequential(*modules)
        self.shape, self.way, self.spread = tuple(shape), way, spread
        layers = _layers(modules, self.shape)
        self.result = layers[-1].result
        self._keep: list[Tensor] = []  # whose addresses the program holds
        if way == "columns":
            self._samples, self._loop = 1, kernel.columns()
            self._size, program = self._columns(layers)
        else:
            vectors = int(way.split()[-1])
            self._samples, self._loop = vectors * kernel.LANES, kernel.panels()
            self._size, program = self._panels(layers, vectors)
        self._program = self._address(np.array(program, np.int64))
        # what a piece takes, in multiplications of a vector (of a number, where it goes sample by sample)
        self._work = sum(
            int(torch.count_nonzero(layer.weight)) * math.prod(layer.image[1:]) for layer in layers
        ) * max(1, self._samples // kernel.LANES)  # fmt: skip
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._loop.address)
        self._head = ctypes.c_int64 * kernel.HEAD
        self._spare: list[Tensor] = []  # scratch memory between calls; each call takes its own
        self._ready = self._make_ready(torch.Size((1, *self.shape)))

    def __reduce__(self) -> Any:
        return Chain, (list(self.dense), self.shape, self.way, self.spread)

    def forward(self, x: Tensor) -> Tensor:
        ready = self._ready  # for inputs like the last one: at batch 1 every microsecond here counts
        if x.shape != ready[0] or x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad:
            if x.shape[1:] != self.shape or x.dtype is not torch.float32 or not x.is_cpu or x.requires_grad:
                return self.dense(x)
            ready = self._ready = self._make_ready(x.shape)
        _, result, pieces, alone = ready
        count = 1 if alone else torch.get_num_threads()
        need = self._size * count
        x, y = x.contiguous(), x.new_empty(result)
        try:
            room = self._spare.pop()
            if room.numel() < need:
                room = x.new_zeros(need)
        except IndexError:
            room = x.new_zeros(need)  # zeros, for what lies around padded images is never written
        head = self._head(0, 0, count, pieces, result[0], x.data_ptr(), y.data_ptr(), room.data_ptr(), self._program)
        if count == 1:
            self._call(head)
        else:
            threads.run(self._loop, ctypes.addressof(head), alone=False)
        self._spare.append(room)
        return y

    def _make_ready(self, shape: torch.Size) -> tuple[Any, ...]:
        """(shape of the input, of the output, pieces, whether one thread does them all)."""
        pieces = -(-shape[0] // self._samples)
        return shape, (shape[0], *self.result), pieces, not self.spread or pieces <= 1 or pieces * self._work < ALONE

    def spreads(self, shape: torch.Size) -> bool:
        """Whether such an input would occupy several threads."""
        return torch.get_num_threads() > 1 and not self._make_ready(shape)[3]

    def _address(self, values: Any) -> int:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        self._keep.append(tensor)
        return tensor.data_ptr()

    def _common(self, layer: _Layer) -> dict[str, int]:
        from ..kernels import inference as kernel

        bias = layer.bias.new_zeros(_whole(len(layer.bias), kernel.LANES))
        bias[: len(layer.bias)] = layer.bias
        return {
            "ROWS": len(layer.weight), "BIAS": self._address(bias),
            "BOUNDS": self._address(np.array(layer.bounds, np.float32)), "CURVE": getattr(kernel, layer.curve),
        }  # fmt: skip

    def _columns(self, layers: list[_Layer]) -> tuple[int, list[int]]:
        """The size of the scratch memory, and the program that goes through columns."""
        from ..kernels import inference as kernel

        if any(layer.weight.dim() != 2 or len(layer.weight) >= 1 << 16 for layer in layers):
            raise Unfit("this way is for Linear layers of less than 65536 units")
        size, program = 0, list[int]()
        for layer in layers:
            units, plane = layer.source[0], _whole(len(layer.weight), kernel.LANES)
            record = {"POSITIONS": units, "TARGET": size, **self._common(layer)}
            if layer.density > FULL:
                values = layer.weight.new_zeros(units, plane)
                values[:, : len(layer.weight)] = layer.weight.t()
                program += _record(**record, WINDOW=1, PLANE=plane, VALUE=self._address(values))
            else:
                column, row = layer.weight.t().nonzero().unbind(1)
                count = torch.bincount(column, minlength=units)
                start = torch.zeros(units + 1, dtype=torch.int64)
                start[1:] = (-(-count // 4) * 4).cumsum(0)
                at = torch.arange(len(column)) + (start[:-1] - (count.cumsum(0) - count))[column]
                rows = np.full(int(start[-1]), len(layer.weight), np.uint16)
                rows[at.numpy()] = row.numpy()
                values = layer.weight.new_zeros(len(rows))
                values[at] = layer.weight[row, column]
                program += _record(
                    **record, START=self._address(start.int()), OFFSET=self._address(rows), VALUE=self._address(values)
                )
            size += _whole(len(layer.weight) + 1, kernel.LANES)
        widest, last = max(layer.source[0] for layer in layers), _whole(layers[-1].result[0] + 1, kernel.LANES)
        return size, [len(layers), size, 1, layers[0].source[0], 0, layers[-1].result[0], size - last, widest, *program]

    def _panels(self, layers: list[_Layer], vectors: int) -> tuple[int, list[int]]:
        """The size of the scratch memory, and the program that goes through panels of so many vectors."""
        from ..kernels import inference as kernel

        margins = [layer.padding for layer in layers] + [(0, 0)]
        shapes = [_image(layers[0].source), *(layer.pooled for layer in layers)]
        regions, size = [], 0
        for (c, h, w), (top, left) in zip(shapes, margins, strict=True):
            regions.append(size)
            size += c * (h + 2 * top) * (w + 2 * left)
        lines = vectors * kernel.LANES
        if size * lines * 4 > ROOM:
            raise Unfit("the activations take too much memory")
        program: list[int] = []
        for i, layer in enumerate(layers):
            (_, _, w), (_, left) = shapes[i], margins[i]
            (_, high, wide), (down, right) = shapes[i + 1], margins[i + 1]
            offset, values, start = _gathers(layer, regions[i])
            come, go, new, window = _windows(layer, w + 2 * left, wide + 2 * right)
            go += regions[i + 1] + down * (wide + 2 * right) + right
            # each position once for every vector; the pixels of a window stay together
            number = np.cumsum(new) - 1
            order = np.argsort(np.tile(number, vectors) * vectors + np.repeat(range(vectors), len(new)), kind="stable")
            vector = np.repeat(np.arange(vectors), len(new))[order]
            come, go, new = (np.tile(a, vectors)[order] for a in (come, go, new))
            program += _record(
                **self._common(layer), START=self._address(start), OFFSET=self._address(offset * lines),
                VALUE=self._address(values), POSITIONS=len(come), WINDOW=window,
                COME=self._address(((come * vectors + vector) * kernel.LANES).astype(np.int32)),
                GO=self._address(((go * vectors + vector) * kernel.LANES).astype(np.int32)),
                NEW=self._address(new.astype(np.uint8)), PLANE=(high + 2 * down) * (wide + 2 * right) * lines,
            )  # fmt: skip
        ends = [_places(shapes[i], margins[i], regions[i]) for i in (0, -1)]
        size *= lines
        return size, [
            len(layers), size, vectors, len(ends[0]), self._address(ends[0]), len(ends[1]), self._address(ends[1]), 0,
            *program,
        ]  # fmt: skip


def _record(**values: int) -> list[int]:
    from ..kernels import inference as kernel

    record = [0] * kernel.FIELDS
    for name, value in values.items():
        record[getattr(kernel, name)] = value
    return record


def _whole(n: int, step: int) -> int:
    return -(-n // step) * step


def _image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (math.prod(shape), 1, 1)


def _places(shape: tuple[int, int, int], margin: Pair, region: int) -> Any:
    """Where every pixel of an image lies that has a margin of zeros."""
    c, h, w = shape
    at = np.arange(c * (h + 2 * margin[0]) * (w + 2 * margin[1]), dtype=np.int32).reshape(c, h + 2 * margin[0], -1)
    return (region + at[:, margin[0] : margin[0] + h, margin[1] : margin[1] + w]).ravel()


def _gathers(layer: _Layer, region: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offset, value, start of each row) of the live weights: where each reads for the first position."""
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
    row, channel, down, right = live = weight.nonzero().unbind(1)
    start = torch.zeros(len(weight) + 1, dtype=torch.int32)
    start[1:] = torch.bincount(row, minlength=len(weight)).cumsum(0)
    channel = channel + row // (len(weight) // layer.groups) * weight.shape[1]
    _, height, width = _image(layer.source)
    high, wide = height + 2 * layer.padding[0], width + 2 * layer.padding[1]
    offset = (channel * high + down * layer.dilation[0]) * wide + right * layer.dilation[1]
    return (region + offset).int(), weight[live].contiguous(), start


def _windows(layer: _Layer, come_wide: int, go_wide: int) -> tuple[Any, Any, Any, int]:
    """(where each position reads, where its window is written, whether it begins one, how the kernel pools)."""
    _, height, width = layer.image
    kernel, stride, padding = layer.pool or ((1, 1), (1, 1), (0, 0))
    _, rows, across = layer.pooled
    y = np.arange(rows)[:, None] * stride[0] - padding[0] + np.arange(kernel[0])  # [rows, kernel]
    x = np.arange(across)[:, None] * stride[1] - padding[1] + np.arange(kernel[1])
    shape = rows, across, *kernel
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    come = y[:, None, :, None] * layer.stride[0] * come_wide + x[None, :, None, :] * layer.stride[1]
    go = np.arange(rows)[:, None, None, None] * go_wide + np.arange(across)[None, :, None, None]
    inside, come, go = (np.broadcast_to(a, shape).reshape(rows * across, -1) for a in (inside, come, go))
    new = inside & (np.cumsum(inside, 1) == 1)
    full = bool(inside.all())
    window = inside.shape[1] if full and inside.shape[1] in (1, 4) else 0
    return come[inside], go[inside], new[inside], window


# ---- What is measured


def _race(
    jobs: dict[str, Callable[[], object]], seconds: float | None = None, of: Callable[[list[float]], float] = min
) -> dict[str, float]:
    """Seconds of a call of each, in turn and in random order: the least, for what else the machine does only adds.

    Three calls follow one that is not timed: after another job the caches hold nothing of this one.
    """
    took: dict[str, list[float]] = {name: [] for name in jobs}
    end = time.perf_counter() + (SECONDS if seconds is None else seconds)
    order, shuffle = list(jobs), random.Random(0).shuffle  # the user's random numbers stay where they are
    while min(map(len, took.values())) < 6 or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            jobs[name]()
            for _ in range(3):
                start = time.perf_counter()
                jobs[name]()
                took[name].append(time.perf_counter() - start)
    return {name: of(times) for name, times in took.items()}


def _close(found: Any, wanted: Any) -> bool:
    """Whether all tensors agree up to rounding, measured by the largest entry of each."""
    a, b = tree_leaves(found), tree_leaves(wanted)
    return len(a) == len(b) and all(map(_near, a, b))


def _near(a: Any, b: Any) -> bool:
    if not isinstance(b, Tensor):
        return True
    if not isinstance(a, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not b.is_floating_point() or not b.numel():
        return torch.equal(a, b)
    scale = b.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def _fastest(modules: list[nn.Module], x: Tensor) -> Chain:
    """The chain of these modules that is the fastest for such an input; `Unfit` if there is none."""
    reason = "no way through it"
    wanted, chains = nn.Sequential(*modules)(x.clone()), dict[str, Chain]()
    for way in WAYS:
        try:
            chain = Chain(modules, tuple(x.shape[1:]), way)
        except Unfit as error:
            reason = str(error)
            continue
        if _close(chain(x), wanted):
            chains[way] = chain
            if chain.spreads(x.shape):
                chains[f"{way}, alone"] = Chain(modules, chain.shape, way, False)
        else:
            reason = f"the result differs by more than {TOLERANCE:.0e} of the largest output"
    if not chains:
        raise Unfit(reason)
    jobs: Any = {way: lambda chain=chain: chain(x) for way, chain in chains.items()}
    seconds = _race(jobs, of=statistics.median)  # not the least: where cores are shared, threads often wait
    return chains[min(seconds, key=seconds.__getitem__)]


# ---- Where the layers are in a network


class _Values(fx.Interpreter):
    """What comes out of every node on the example."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value.clone() if isinstance(value, Tensor) else value  # it may be changed in place
        return value


@dataclass
class _Site:
    """A layer in its network: what it is there, and what comes in on the example."""

    layer: _Layer | None
    name: str
    module: nn.Module
    x: Tensor | None
    follows: bool = False  # the layer before it gives to nothing but this one
    why: str = ""


class _Traced:
    """A network whose operations torch.fx shows."""

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module = fx.symbolic_trace(model)
        values = _Values(self.module)
        values.run(*inputs)
        for node in list(self.module.graph.nodes):
            _as_module(self.module, node, values.values)
        self.module.graph.eliminate_dead_code()
        self.folded = self._fold(values.values)
        self.module.delete_all_unused_submodules()
        self.module.recompile()
        self.sites = list(self._sites(values.values))

    def _fold(self, values: dict[str, Any]) -> int:
        """Norms into the layers before them, where that rounds to the same; returns how many."""
        uses = Counter(node.target for node in self.module.graph.nodes if node.op == "call_module")
        folded = 0
        for node in list(self.module.graph.nodes):
            norm, before = _module(self.module, node), node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or len(before.users) > 1 or uses[before.target] > 1:
                continue
            layer, fuse = _module(self.module, before), _FUSE.get((type(_module(self.module, before)), type(norm)))
            if fuse is None or norm.running_mean is None or _hooked(norm) or _hooked(layer):  # type: ignore[arg-type, union-attr]
                continue
            fused = fuse(layer, norm)
            source = before.args[0]
            if isinstance(source, fx.Node) and _close(fused(values[source.name]), values[node.name]):
                self.module.set_submodule(str(before.target), fused)
                values[before.name] = values[node.name]
                node.replace_all_uses_with(before)
                self.module.graph.erase_node(node)
                folded += 1
        return folded

    def _sites(self, values: dict[str, Any]) -> Iterator[_Site]:
        last: _Layer | None = None  # the chain so far ends with it
        flat: list[fx.Node] = []  # in front of the first layer
        for node in self.module.graph.nodes:
            module, source = _module(self.module, node), node.args[0] if node.args else None
            if module is None or not isinstance(source, fx.Node):
                continue
            alone = len(source.users) == 1
            if type(module) in (nn.Linear, nn.Conv2d):
                after = last is not None and alone and source.name == last.nodes[-1]
                before = flat if flat and flat[-1] is source and alone else []
                x = values[before[0].all_input_nodes[0].name if before else source.name]
                try:
                    layers = _layers([*(_module(self.module, n) for n in before), module], tuple(x.shape[1:]))  # type: ignore[list-item]
                    last = layers[0]
                    last.name, last.nodes = str(node.target), [*(n.name for n in before), node.name]
                    yield _Site(last, last.name, module, x, after)
                except Unfit as error:
                    last = None
                    yield _Site(None, str(node.target), module, None, False, str(error))
            elif last is not None and alone and source.name == last.nodes[-1]:
                try:
                    _follow(last, module)
                    last.nodes.append(node.name)
                except Unfit:
                    last = None
            elif type(module) is nn.Flatten:
                flat = [node]

    def build(
        self, sites: list[_Site], chosen: list[bool], way: Callable[[list[nn.Module], Tensor], Chain]
    ) -> nn.Module:
        """The network with every run of chosen layers as a chain; the chain alone, if that is all of it."""
        module = copy.deepcopy(self.module)
        nodes = {node.name: node for node in module.graph.nodes}
        runs: list[list[_Site]] = []
        for i, site in enumerate(sites):
            if chosen[i] and site.layer is not None:
                if runs and i and chosen[i - 1] and site.follows:
                    runs[-1].append(site)
                else:
                    runs.append([site])
        for number, run in enumerate(runs):
            names = [name for site in run for name in site.layer.nodes]  # type: ignore[union-attr]
            chain = way([m for site in run for m in site.layer.modules], run[0].x)  # type: ignore[union-attr, arg-type]
            first, last = nodes[names[0]], nodes[names[-1]]
            module.add_submodule(f"chain_{number}", chain)
            with module.graph.inserting_before(first):
                call = module.graph.call_module(f"chain_{number}", (first.args[0],))
            last.replace_all_uses_with(call)
            for name in reversed(names):
                module.graph.erase_node(nodes[name])
            if [node.op for node in module.graph.nodes] == ["placeholder", "call_module", "output"] and (
                list(module.graph.nodes)[-1].args == (call,)
            ):
                return chain
        module.delete_all_unused_submodules()
        module.recompile()
        return module


class _Untraced:
    """A network that torch.fx cannot trace: its Linear and Conv2d one by one."""

    folded = 0

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.module, self.sites = model, list[_Site]()
        seen: dict[str, list[Any]] = {}
        hooks = []
        layers = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d) and not _hooked(m)}
        for name, module in layers.items():
            take = seen.setdefault(name, []).append
            hooks.append(module.register_forward_pre_hook(lambda _, args, take=take: take(args)))
        model(*inputs)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            args = seen[name]
            try:
                if not args or len(args[0]) != 1:
                    raise Unfit("it was not called with one tensor")
                x = args[0][0].clone()
                layer = _layers([module], tuple(x.shape[1:]))[0]
                self.sites.append(_Site(layer, name, module, x))
            except Unfit as error:
                self.sites.append(_Site(None, name, module, None, why=str(error)))

    def build(
        self, sites: list[_Site], chosen: list[bool], way: Callable[[list[nn.Module], Tensor], Chain]
    ) -> nn.Module:
        """The network with every chosen layer as a chain of its own."""
        model = copy.deepcopy(self.module)
        for site, sparse in zip(sites, chosen, strict=True):
            if sparse and site.layer is not None and site.x is not None:
                model.set_submodule(site.name, way(site.layer.modules, site.x))
        return model


_FUSE: dict[tuple[type, type], Callable[[Any, Any], nn.Module]] = {
    (nn.Conv2d, nn.BatchNorm2d): fuse_conv_bn_eval,
    (nn.Linear, nn.BatchNorm1d): fuse_linear_bn_eval,
}


def _module(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls with one tensor."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return root.get_submodule(str(node.target))


# An operation as the module that is the same: (its options in order, the module made of them).
_OPTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., nn.Module]]] = {}
for _names, _options, _make in (
    ((torch.relu, F.relu, "relu"), ("inplace",), nn.ReLU),
    ((torch.sigmoid, F.sigmoid, "sigmoid"), (), nn.Sigmoid),
    ((torch.tanh, F.tanh, "tanh"), (), nn.Tanh),
    ((F.silu,), ("inplace",), nn.SiLU),
    ((F.gelu,), ("approximate",), nn.GELU),
    ((F.relu6,), ("inplace",), nn.ReLU6),
    ((F.leaky_relu,), ("negative_slope", "inplace"), nn.LeakyReLU),
    (
        (torch.flatten, "flatten"),
        ("start_dim", "end_dim"),
        lambda start_dim=0, end_dim=-1: nn.Flatten(start_dim, end_dim),
    ),
    (
        (F.max_pool2d, torch.max_pool2d),
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        lambda kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: nn.MaxPool2d(
            kernel_size, stride, padding, dilation, return_indices, ceil_mode
        ),
    ),
):
    for _name in _names:
        _OPTIONS[_name] = _options, _make


def _as_module(root: fx.GraphModule, node: fx.Node, values: dict[str, Any]) -> None:
    """Turn a call of a function, such as F.relu, into one of its module, which is easier to recognise."""
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return
    source = node.args[0]
    if node.target in ("view", "reshape"):
        if not _flattens(node, values):
            return
        module: nn.Module = nn.Flatten()
    elif node.target is F.dropout and not node.kwargs.get("training", True):
        module = nn.Identity()
    elif node.target in _OPTIONS:
        options, make = _OPTIONS[node.target]
        given = {**dict(zip(options, node.args[1:], strict=False)), **node.kwargs}
        if (
            not all(isinstance(value, int | float | str | tuple | None) for value in given.values())
            or len(node.args) > len(options) + 1
        ):
            return
        given = {name: value for name, value in given.items() if name in options}
        module = make(**given)
    else:
        return
    name = f"as_module_{node.name}"
    root.add_submodule(name, module.eval())
    with root.graph.inserting_before(node):
        call = root.graph.call_module(name, (source,))
    values[call.name] = values[node.name]
    node.replace_all_uses_with(call)
    root.graph.erase_node(node)


def _flattens(node: fx.Node, values: dict[str, Any]) -> bool:
    """Whether it is x.view(len(x), -1) or x.view(-1, n): the batch stays, whatever its size."""
    x, y = values[node.all_input_nodes[0].name], values[node.name]
    if not isinstance(x, Tensor) or y.dim() != 2 or len(y) != len(x) or len(node.args) != 3:
        return False
    first = node.args[1]
    if not isinstance(first, fx.Node):
        return bool(first == -1)
    if first.op == "call_method" and first.target == "size":
        return first.args[1:] == (0,)
    if first.target is operator.getitem and first.args[1] == 0 and isinstance(first.args[0], fx.Node):
        shape = first.args[0]
        return shape.target == "size" or (shape.target is getattr and shape.args[1] == "shape")
    return False


# ---- The whole


class InferenceModule(nn.Module):
    """What `optimize_for_inference` returns: called like the network it was made of; `report` says what it does."""

    def __init__(self, network: nn.Module, report: InferenceReport) -> None:
        super().__init__()
        self.network, self.report = network, report
        self.eval()
        if isinstance(network, Chain):  # nothing in between
            self.forward = network.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


def optimize_for_inference(model: nn.Module, example_inputs: tuple[Any, ...]) -> InferenceModule:
    """A copy of `model` in eval mode that computes the same, faster where that was measured.

    Units that do nothing are removed, BatchNorm is folded into the layer before it, and every Linear and Conv2d
    computes densely or on its live weights alone, whichever was faster for these inputs on this machine with torch's
    present number of threads. Neighbours that are sparse become one call, with their activations and poolings. If all
    that is not faster than the network as it was, the result is the network as it was. Measuring takes about half a
    second per layer; measure where nothing else runs.

    The outputs are those of `model.eval()` up to 1e-5 of the largest, checked on the example. Other batch sizes
    compute right as well, and what the sparse loops cannot take (another dtype or device, or inputs that ask for a
    gradient) goes through torch. The weights are a snapshot, and ask for no gradient. Sparse layers leave out what is
    multiplied by zero, so an infinite input does not become NaN there. Several threads may call the result at once.

    Args:
        model: any network; it is not changed. What torch.fx cannot trace is treated layer by layer.
        example_inputs: the positional arguments, such as `(x,)` with x of the batch size that is to be fast.

    Raises:
        TypeError: `model` is no module, or `example_inputs` no tuple.
        ValueError: the network cannot be called with `example_inputs`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` is {type(model).__name__}; expected a torch.nn.Module.")
    if not isinstance(example_inputs, tuple) or not any(isinstance(x, Tensor) for x in example_inputs):
        raise TypeError(
            f"`example_inputs` is {type(example_inputs).__name__}; expected a tuple of the arguments, such as (x,)."
        )
    with torch.no_grad():
        dense = copy.deepcopy(model).eval().requires_grad_(False)
        try:
            wanted = dense(*example_inputs)
        except Exception as error:
            raise ValueError(
                f"`example_inputs` do not fit: {type(model).__name__} raised {type(error).__name__}: {error}"
            ) from error
        return _optimized(dense, example_inputs, wanted)


def _optimized(dense: nn.Module, inputs: tuple[Any, ...], wanted: Any) -> InferenceModule:
    notes: list[str] = []
    networks: dict[str, nn.Module] = {"dense": dense}
    plan: _Traced | _Untraced
    before: nn.Module
    try:
        traced = plan = _Traced(dense, inputs)
        folded, before = plan.folded, plan.module
        small = _compact(before, inputs, notes)  # with the norms folded a dead unit has no shift of its own
        if small is not before:
            plan = _Traced(small, inputs)
        for found in (traced, plan):
            if not _close(found.module(*inputs), wanted):
                raise RuntimeError("the trace computes something else")
    except Exception as error:
        lines = str(error).splitlines() or [""]
        notes.append(f"torch.fx cannot trace the network ({lines[0]}): layers one by one, no BatchNorm folded.")
        folded, before = 0, dense
        small = _compact(dense, inputs, notes)
        plan = _Untraced(copy.deepcopy(small), inputs)
    if folded or small is not before:
        networks["dense, simplified"] = plan.module
    if any(isinstance(m, nn.Conv2d) for m in plan.module.modules()):
        channels_last: Any = {"memory_format": torch.channels_last}
        networks["dense, channels last"] = copy.deepcopy(plan.module).to(**channels_last)
    sites = plan.sites
    reason = _reason(inputs)
    fast: dict[tuple[int, ...], Chain] = {}

    def fastest(modules: list[nn.Module], x: Tensor) -> Chain:
        key = tuple(map(id, modules))
        if key not in fast:
            fast[key] = _fastest(modules, x)
        return fast[key]

    choices = [_choice(site, reason, fastest) for site in sites]
    chosen = [choice.chosen == "sparse" for choice in choices]
    able = [choice.sparse is not None for choice in choices]
    plans = {"sparse where each layer alone was faster": chosen, "sparse wherever it can be": able}
    for name, which in plans.items():
        if any(which) and not (which is able and able == chosen):
            try:
                networks[name] = plan.build(sites, which, fastest)
            except Unfit as error:
                notes.append(f"{name}: {error}.")
    for name in list(networks)[1:]:
        try:
            right = _close(networks[name](*inputs), wanted)
        except Exception:  # a network that looks into its own layers finds something else there
            right = False
        if not right:
            del networks[name]
            notes.append(f"{name}: the outputs are not those of the dense network, so it is not used.")
    seconds = _race({name: lambda n=n: n(*inputs) for name, n in networks.items()}, 2 * SECONDS)  # type: ignore[misc]
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > MARGIN * seconds["dense"]:
        best = "dense"
        notes.append("Nothing was faster than the dense network, so the result is the dense network.")
    chosen = plans.get(best, [False] * len(sites))
    choices = [_settled(choice, sparse) for choice, sparse in zip(choices, chosen, strict=True)]
    if small is not before and best != "dense":
        notes.append(f"Units that do nothing removed: {_size(dense):,} parameters before, {_size(small):,} after.")
    if folded and best != "dense":
        notes.append(f"BatchNorm folded into the layer before it: {folded}.")
    chains = [m for m in networks[best].modules() if isinstance(m, Chain)]
    if ways := sorted({m.way if m.spread else f"{m.way} on one thread" for m in chains}):
        notes.append(f"Chains go through {' and '.join(ways)}.")
    batch = next(len(x) if x.dim() else 1 for x in inputs if isinstance(x, Tensor))
    report = InferenceReport(
        tuple(choices), batch, torch.get_num_threads(), seconds["dense"], seconds[best], best, tuple(notes)
    )
    return InferenceModule(networks[best], report)


def _compact(model: nn.Module, inputs: tuple[Any, ...], notes: list[str]) -> nn.Module:
    """The network without the units that do nothing, if it has fewer weights that are not zero."""
    tensors = all(isinstance(x, Tensor) for x in inputs)
    try:
        small = compact(model, inputs) if tensors else model
    except (TypeError, ValueError, RuntimeError) as error:
        notes.append(f"Nothing was removed: {error}.")
        return model
    if _live(small) > _live(model):  # two factors of low rank instead of a sparse matrix
        return model
    return small.eval().requires_grad_(False)


def _live(model: nn.Module) -> int:
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _reason(inputs: tuple[Any, ...]) -> str:
    """Why no layer can be sparse, whatever it is; empty if it can."""
    if not kernels.available():
        return "Numba is not installed: pip install 'torch-bregman[fast]'"
    if any(isinstance(x, Tensor) and x.device.type != "cpu" for x in inputs):
        return "the inputs are not on a CPU"
    return ""


def _choice(site: _Site, reason: str, fastest: Callable[[list[nn.Module], Tensor], Chain]) -> LayerChoice:
    """Dense or sparse, for this layer alone."""
    weight: Tensor = site.module.weight  # type: ignore[assignment]
    what = site.name, tuple(weight.shape), torch.count_nonzero(weight).item() / max(1, weight.numel())
    reason = reason or site.why
    if not reason and site.layer is not None and site.x is not None:
        modules, x = site.layer.modules, site.x
        try:
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise Unfit(f"the input is {x.dtype} on {x.device}; the kernels need float32 on a CPU")
            dense, chain = nn.Sequential(*modules), fastest(modules, x)
        except Unfit as error:
            reason = str(error)
        else:
            took = _race({"dense": lambda: dense(x), "sparse": lambda: chain(x)})
            a, b = took["dense"], took["sparse"]
            faster = b < MARGIN * a
            why = f"sparse is {a / b:.1f} times as fast" if faster else f"sparse takes {b / a:.1f} times as long"
            return LayerChoice(*what, a, b, "sparse" if faster else "dense", why)
    return LayerChoice(*what, None, None, "dense", reason)


def _settled(choice: LayerChoice, sparse: bool) -> LayerChoice:
    """The choice that the whole network made of it."""
    chosen = "sparse" if sparse else "dense"
    if chosen == choice.chosen:
        return choice
    return replace(choice, chosen=chosen, why=f"{choice.why} alone, but the whole is faster this way")
