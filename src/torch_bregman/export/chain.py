"""A chain of layers as tables of their live weights, and one call of a compiled loop for the whole of it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels import threads

ALONE = 1 << 16  # multiplications of a vector that are over before a second thread has woken up
FULL = 0.2  # density from which a column is stored with its zeros: they cost less than indices
ROOM = 1 << 28  # bytes of activations of one piece, beyond which a layer stays dense
WAYS = ("columns", "panels of 1", "panels of 2", "panels of 4")
Pair = tuple[int, int]


class Unfit(Exception):  # noqa: N818 - it says what the layer is
    """A module that no chain takes, and why."""


# ---- The layers that a chain can be made of


@dataclass
class Layer:
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


def _begin(name: str, module: nn.Module, shape: tuple[int, ...]) -> Layer:
    """The layer that `module` begins for samples of this shape; `Unfit` where there is none."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        raise Unfit(f"{type(module).__name__} begins no chain")
    if hooked(module):
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
        return Layer(name, [module], weight, bias, shape, (out,), (out, 1, 1), pooled=(out, 1, 1))
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
    return Layer(
        name, [module], weight, bias, shape, image, image, stride, padding, dilation, module.groups, pooled=image
    )


def follow(layer: Layer, module: nn.Module) -> None:
    """Let the layer do what `module` does to its result; `Unfit` where it cannot."""
    if hooked(module):
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


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def layers_of(modules: list[nn.Module], shape: tuple[int, ...]) -> list[Layer]:
    """The modules one after the other as layers; `Unfit` if they are no chain."""
    found: list[Layer] = []
    before: list[nn.Module] = []
    for module in modules:
        if type(module) in (nn.Linear, nn.Conv2d):
            found.append(_begin("", module, found[-1].result if found else shape))
            found[-1].modules[:0], before = before, []
        elif found:
            follow(found[-1], module)
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
        layers = layers_of(modules, self.shape)
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

    def _common(self, layer: Layer) -> dict[str, int]:
        from ..kernels import inference as kernel

        bias = layer.bias.new_zeros(_whole(len(layer.bias), kernel.LANES))
        bias[: len(layer.bias)] = layer.bias
        return {
            "ROWS": len(layer.weight), "BIAS": self._address(bias),
            "BOUNDS": self._address(np.array(layer.bounds, np.float32)), "CURVE": getattr(kernel, layer.curve),
        }  # fmt: skip

    def _columns(self, layers: list[Layer]) -> tuple[int, list[int]]:
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

    def _panels(self, layers: list[Layer], vectors: int) -> tuple[int, list[int]]:
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


def _gathers(layer: Layer, region: int) -> tuple[Tensor, Tensor, Tensor]:
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


def _windows(layer: Layer, come_wide: int, go_wide: int) -> tuple[Any, Any, Any, int]:
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
