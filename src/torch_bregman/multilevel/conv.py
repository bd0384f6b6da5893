"""Unstructured supports of filters: the convolution that computes with the live weights alone, and pooling beside it.

Activations lie batch-last, [C, H, W, batch] without gaps, seen as [batch, C, H, W]. What comes out lies so, and ReLU,
`flatten(1)` and `sparse_linear` take it without a copy; every other layout is right too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import kernels
from ..kernels import DTYPES, LINE_BYTES, threads
from ..part import Part
from .linear import ALONE, check_values
from .twice import gradients, placed

PIXELS = 512 << 10  # bytes of input that a piece reads at most, if it can: a part of the level-2 cache
PIECES = 16  # that the work is cut into at least, if it can be
SLOTS = 32, 1 << 24  # sums of the weight gradient beside each other at most, and their entries together
Pair = tuple[int, int]


@dataclasses.dataclass
class _Lists:
    """A convolution as the kernels want it, y[row, q·phases + phase] = Σ_k w_k x[channel_k, q·stride + low + d_k].

    `channel`, `dy`, `dx`: what a weight reads, d_k = (dy, dx)_k. `start`: of every row in every phase, divided into
    `steps` by dy. `order`: where the value of an entry is, None if in its own place. `low`, `span`: the first pixel
    from q·stride on that a weight may read, and how many from there.
    """

    start: Tensor
    channel: Tensor
    dy: Tensor
    dx: Tensor
    order: Tensor | None
    stride: Pair
    phases: Pair
    low: Pair
    span: Pair
    steps: int = 1
    offsets: dict[tuple[int, int, int], Tensor] = dataclasses.field(default_factory=dict)

    def offset(self, high: int, broad: int, lanes: int) -> Tensor:
        """Where the pixel of a weight lies in a buffer [channels, high, broad, lanes]."""
        key = (high, broad, lanes)
        if key not in self.offsets:
            if len(self.offsets) >= 4:
                self.offsets.clear()
            self.offsets[key] = (((self.channel * high + self.dy) * broad + self.dx) * lanes).int()
        return self.offsets[key]


class ConvPattern(Part):
    """Where a weight of a convolution [out, in/groups, kh, kw] is not zero, entry by entry, row by row.

    Args:
        weight: the weight, in any layout.
        index: the live entries of weight.flatten(), ascending, instead of those that `weight` shows.

    Raises:
        ValueError: `weight` has not four dimensions, or 2³¹ live entries or more.
    """

    def __init__(self, weight: Tensor, index: Tensor | None = None) -> None:
        if weight.dim() != 4:
            raise ValueError(f"`weight` has shape {tuple(weight.shape)}; expected [out, in/groups, kh, kw].")
        super().__init__(weight, (), index)
        if len(self) >= 1 << 31:
            raise ValueError(f"`weight` has {len(self):,} live entries; expected fewer than 2^31.")
        self.shape = tuple(weight.shape)
        self._lists: dict[tuple[Pair, Pair, Pair, int], tuple[_Lists, _Lists]] = {}

    def lists(self, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> tuple[_Lists, _Lists]:
        """Those of the convolution and of its transpose; made once for each kind."""
        key = (stride, padding, dilation, groups)
        if key not in self._lists:
            self._lists[key] = self._forward(*key), self._backward(*key)
        return self._lists[key]

    def _entries(self, groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(filter, channel of the input, row, column) of every live weight."""
        row, channel, i, j = torch.unravel_index(self.index, self.shape)
        return row, row // max(self.shape[0] // groups, 1) * self.shape[1] + channel, i, j

    def _forward(self, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> _Lists:
        row, channel, i, j = self._entries(groups)
        span = dilation[0] * (self.shape[2] - 1) + 1, dilation[1] * (self.shape[3] - 1) + 1
        low = -padding[0], -padding[1]
        start = _starts(row, self.shape[0])
        return _Lists(start, channel, i * dilation[0], j * dilation[1], None, stride, (1, 1), low, span)

    def _backward(self, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> _Lists:
        row, channel, i, j = self._entries(groups)
        channels = self.shape[1] * groups
        # Pixel y = q·s + phase of the input is reached from position (y + p − i·d) / s, where that is a whole number.
        phases, steps, lows, spans = [], [], [], []
        for at, s, p, d, n in zip((i, j), stride, padding, dilation, self.shape[2:], strict=True):
            reach = (torch.arange(n) * d - p) % s + p - torch.arange(n) * d
            far = torch.div(reach, s, rounding_mode="floor")
            low = int(far.min()) if n else 0
            phases.append((at * d - p) % s)
            steps.append(far[at] - low)
            lows.append(low)
            spans.append(int(far.max()) - low + 1 if n else 1)
        place = ((phases[0] * stride[1] + phases[1]) * channels + channel) * spans[0] + steps[0]
        order = torch.argsort(place, stable=True)
        start = _starts(place, stride[0] * stride[1] * channels * spans[0])
        return _Lists(
            start, row[order], steps[0][order], steps[1][order], order, (1, 1), stride,
            (lows[0], lows[1]), (spans[0], spans[1]), spans[0],
        )  # fmt: skip


def _starts(rows: Tensor, n: int) -> Tensor:
    """Where each of `n` rows starts in a list sorted by rows."""
    starts = torch.zeros(n + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(rows, minlength=n), 0, out=starts[1:])
    return starts


def _pair(name: str, value: Any, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"`{name}` is {value!r}; expected a whole number from {least} on, or a pair of them.")
    return pair


def _padding(value: Any, kernel: Pair, stride: Pair, dilation: Pair) -> Pair:
    if value == "valid":
        return 0, 0
    if value != "same":
        return _pair("padding", value, 0)
    around = dilation[0] * (kernel[0] - 1), dilation[1] * (kernel[1] - 1)
    if stride != (1, 1) or around[0] % 2 or around[1] % 2:
        raise ValueError(
            f"`padding` is 'same' with kernel {kernel}, dilation {dilation} and stride {stride}; expected stride 1 and "
            f"dilation·(kernel − 1) even, so that both sides are padded alike."
        )
    return around[0] // 2, around[1] // 2


@functools.cache
def _tile(stride: Pair, span: Pair, channels: int, positions: Pair, vectors: int) -> tuple[int, int, int, int, int]:
    """(TALL, WIDE, HIGH, BROAD of the kernels, how many pieces): the least to copy of what fits a piece's cache.

    The sizes do not depend on the number of threads, and so the rounding does not either.
    """
    na, nb = positions
    found: dict[tuple[bool, bool, bool, int, int], tuple[int, int, int, int, int]] = {}
    for tall in {-(-na // n) for n in range(1, na + 1)}:
        for wide in {-(-nb // n) for n in range(1, nb + 1)}:
            high, broad = (tall - 1) * stride[0] + span[0], (wide - 1) * stride[1] + span[1]
            pieces = vectors * -(-na // tall) * -(-nb // wide)
            bulky = channels * high * broad * LINE_BYTES > PIXELS and tall * wide > 8
            few = pieces < PIECES and tall * wide > 16
            sliver = tall * wide < min(8, na * nb)
            copied = pieces * channels * high * broad
            found[sliver, bulky, few, copied, -wide] = tall, wide, high, broad, pieces
    return found[min(found)]


def _batch_last(*shape: int, like: Tensor) -> Tensor:
    """An empty [batch, C, H, W] that lies batch-last."""
    batch, *rest = shape
    return like.new_empty(*rest, batch).permute(3, 0, 1, 2)


def _head(lists: _Lists, x: Tensor, tile: tuple[int, int, int, int, int], positions: Pair) -> Any:
    from ..kernels import conv

    tall, wide, high, broad, pieces = tile
    head = np.zeros(conv.SIZE, np.int64)
    head[conv.PIECES : conv.LOW_X + 1] = (pieces, len(x), *positions, tall, wide, high, broad, *lists.low)
    head[conv.X : conv.STRIDE_X + 1] = (x.data_ptr(), *x.stride(), *x.shape[1:], *lists.stride)
    head[conv.START] = lists.start.data_ptr()
    return head


def _product(lists: _Lists, x: Tensor, values: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The convolution in `lists` of x: [batch, rows, H', W'], batch-last."""
    from ..kernels import conv

    y = _batch_last(*shape, like=x)
    if y.numel() == 0:
        return y
    batch, rows, height, width = shape
    positions = -(-height // lists.phases[0]), -(-width // lists.phases[1])
    lanes = LINE_BYTES // x.dtype.itemsize
    tile = _tile(lists.stride, lists.span, x.shape[1], positions, -(-batch // lanes))
    offset = lists.offset(tile[2], tile[3], lanes)
    values = values.contiguous() if lists.order is None else values[lists.order]
    bias = None if bias is None else bias.contiguous()
    head = _head(lists, x, tile, positions)
    head[conv.ROWS], head[conv.STEPS] = rows, lists.steps
    head[conv.OFFSET], head[conv.VALUE] = offset.data_ptr(), values.data_ptr()
    head[conv.BIAS] = 0 if bias is None else bias.data_ptr()
    head[conv.Y : conv.PHASES_X + 1] = (y.data_ptr(), height, width, *lists.phases)
    threads.run(conv.product(DTYPES[x.dtype]), head.ctypes.data, alone=_alone(values, positions, x))
    return y


def _sampled(lists: _Lists, x: Tensor, grad: Tensor, live: int) -> Tensor:
    """The gradient of the values: Σ over batch and positions of grad · x."""
    from ..kernels import conv

    if live == 0 or grad.numel() == 0:
        return x.new_zeros(live)
    positions = grad.shape[2], grad.shape[3]
    lanes = LINE_BYTES // x.dtype.itemsize
    tile = _tile(lists.stride, lists.span, x.shape[1], positions, -(-len(x) // lanes))
    slots = max(1, min(tile[-1], SLOTS[0], SLOTS[1] // live))
    found = x.new_empty(slots, live)
    head = _head(lists, x, tile, positions)
    offset = lists.offset(tile[2], tile[3], lanes)
    head[conv.ROWS], head[conv.OFFSET], head[conv.VALUE] = grad.shape[1], offset.data_ptr(), found.data_ptr()
    head[conv.G : conv.LIVE + 1] = (grad.data_ptr(), *grad.stride(), slots, live)
    threads.run(conv.sampled(DTYPES[x.dtype]), head.ctypes.data, alone=_alone(found[0], positions, x))
    return found.sum(0)


def _alone(values: Tensor, positions: Pair, x: Tensor) -> bool:
    return len(values) * positions[0] * positions[1] * len(x) + x.numel() <= ALONE


class _SparseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: ConvPattern,
        key: tuple[Pair, Pair, Pair, int], shape: tuple[int, ...], near: ConvPattern | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, values, bias)
        ctx.pattern, ctx.key, ctx.beside = pattern, key, near
        ctx.lists, ctx.near = pattern.lists(*key), near and (near.lists(*key)[0], len(near))
        return _product(ctx.lists[0], x, values[: len(pattern)], bias, shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, values, bias = ctx.saved_tensors
        if torch.is_grad_enabled():

            def dense(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
                return functional.conv2d(x, placed(values, ctx.pattern, ctx.beside), bias, *ctx.key)

            found = gradients(dense, (x, values, bias), ctx.needs_input_grad[:3], grad)
            return (*found, None, None, None, None)
        forward, backward = ctx.lists
        to_x = to_values = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = _product(backward, grad, values, None, tuple(x.shape))
        if ctx.needs_input_grad[1]:
            more = ctx.near[1] if ctx.near else 0
            to_values = _sampled(forward, x, grad, len(values) - more)
            if more:
                to_values = torch.cat([to_values, _sampled(ctx.near[0], x, grad, more)])
        if ctx.needs_input_grad[2]:
            to_bias = grad.sum((0, 2, 3))
        return to_x, to_values, to_bias, None, None, None, None


def _check_dtypes(**tensors: Tensor | None) -> None:
    dtype = next(t.dtype for t in tensors.values() if t is not None)
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.dtype != dtype or tensor.device.type != "cpu"):
            raise ValueError(
                f"`{name}` is {tensor.dtype} on {tensor.device}; expected float32 or float64, all alike, on a CPU."
            )


def sparse_conv2d(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: ConvPattern, stride: int | Pair = 1,
    padding: int | Pair | str = 0, dilation: int | Pair = 1, groups: int = 1, *, near: ConvPattern | None = None,
) -> Tensor:  # fmt: skip
    """F.conv2d [batch, out, H', W'] with the weight that has `values` on `pattern` and zeros elsewhere.

    Forward, the gradient to x and the gradient to `values` each cost 2·batch·H'·W'·len(pattern) operations; nothing of
    the size of the weight is made. The result lies batch-last.

    Args:
        x: [batch, in, H, W], float32 or float64, in the memory of this machine, in any layout.
        values: the live weights, in the order of `pattern.restrict`.
        bias: [out] or None.
        stride, padding, dilation, groups: as in F.conv2d; zeros around the image, on both sides alike.
        near: as for `sparse_linear`.

    Raises:
        ImportError: without Numba (extra `fast`).
        ValueError: shapes, dtypes or arguments that do not fit.
    """
    kernels.require("sparse_conv2d")
    out, per_group, *kernel = pattern.shape
    if not isinstance(groups, int) or groups < 1 or out % groups:
        raise ValueError(f"`groups` is {groups!r}; expected a whole number that divides the {out} filters.")
    steps, spread = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    around = _padding(padding, (kernel[0], kernel[1]), steps, spread)
    if x.dim() != 4 or x.shape[1] != per_group * groups:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; expected [batch, {per_group * groups}, height, width].")
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], around, spread, kernel, steps, strict=True)
    ]
    if min(size) < 1:
        raise ValueError(
            f"`x` has shape {tuple(x.shape)}; expected images that, with padding {around}, are no smaller than the "
            f"kernel {tuple(kernel)} with dilation {spread}."
        )
    check_values(values, pattern, near)
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}; expected ({out},).")
    _check_dtypes(x=x, values=values, bias=bias)
    shape = (len(x), out, *size)
    return _SparseConv2d.apply(x, values, bias, pattern, (steps, around, spread, groups), shape, near)  # type: ignore[no-untyped-call]


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        from ..kernels import conv

        xt = x.detach().permute(1, 2, 3, 0).contiguous()
        y, which = _batch_last(*shape, like=x), _batch_last(*shape, like=x)
        ctx.sizes, ctx.shape = sizes, tuple(x.shape)
        ctx.save_for_backward(which)
        _pool(conv.pool(DTYPES[x.dtype]), xt, y, which, tuple(x.shape), sizes)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from ..kernels import conv

        (grad,) = grads
        (which,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _unpool(grad, which, ctx.shape, ctx.sizes), None, None
        gt = grad.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        to_x = _batch_last(*ctx.shape, like=grad)
        _pool(conv.unpool(DTYPES[grad.dtype]), to_x, gt, which, ctx.shape, ctx.sizes)
        return to_x, None, None


def _unpool(grad: Tensor, which: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    """The gradient of a pooling by torch's operations, as a function of `grad`."""
    _, across, step_y, step_x, around_y, around_x, _ = sizes
    number, (rows, columns) = which.to(torch.int64), grad.shape[2:]
    y = torch.arange(rows)[:, None] * step_y - around_y + number // across
    x = torch.arange(columns) * step_x - around_x + number % across
    place = (y * shape[3] + x).masked_fill(number < 0, 0).flatten(2)
    flat = grad.new_zeros(*shape[:2], shape[2] * shape[3])
    return flat.scatter_add(2, place, grad.masked_fill(number < 0, 0).flatten(2)).view(shape)


def _pool(loop: Any, x: Tensor, y: Tensor, which: Tensor, shape: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    addresses = (x.data_ptr(), y.data_ptr(), which.data_ptr())
    head = np.array([0, shape[1], shape[0], *addresses, *shape[2:], *y.shape[2:], *sizes], np.int64)
    threads.run(loop, head.ctypes.data, alone=x.numel() <= ALONE)


def max_pool2d(
    x: Tensor, kernel_size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0, *, relu: bool = False
) -> Tensor:
    """F.max_pool2d [batch, C, H', W'] for activations that lie batch-last, and so does the result.

    Args:
        x: [batch, C, H, W], float32 or float64, in the memory of this machine; other layouts are copied.
        kernel_size, stride, padding: as in F.max_pool2d; stride None is the kernel size.
        relu: pool relu(x), in one pass over x; the same result and gradient.

    Raises:
        ImportError: without Numba (extra `fast`).
        ValueError: shapes, dtypes or arguments that do not fit.
    """
    kernels.require("max_pool2d")
    kernel = _pair("kernel_size", kernel_size, 1)
    steps = kernel if stride is None else _pair("stride", stride, 1)
    around = _pair("padding", padding, 0)
    if 2 * around[0] > kernel[0] or 2 * around[1] > kernel[1]:
        raise ValueError(f"`padding` is {padding!r}; expected at most half the kernel {kernel}.")
    if x.dim() != 4:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; expected [batch, channels, height, width].")
    _check_dtypes(x=x)
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], around, kernel, steps, strict=True)]
    if min(size) < 1:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; expected images no smaller than the kernel {kernel}.")
    shape = (*x.shape[:2], *size)
    return _MaxPool2d.apply(x, (*kernel, *steps, *around, int(relu)), shape)  # type: ignore[no-untyped-call]
