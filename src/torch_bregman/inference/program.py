"""What the compiled loops read: the live weights of a chain in tables, and a program of where these lie."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .links import Link, Pair, Unfit

FULL = 0.2  # density from which a column is stored with its zeros: they cost less than indices
ROOM = 1 << 28  # bytes of activations of one piece, beyond which a layer stays dense


@dataclass
class Program:
    """What a loop is called with.

    Attributes:
        samples: of a piece, which one thread takes through all layers.
        size: numbers of scratch memory that a thread needs.
        address: of the program, whose fields kernels/inference.py names.
        keep: the tensors whose addresses are in it.
    """

    samples: int
    size: int = 0
    address: int = 0
    keep: list[Tensor] = field(default_factory=list)

    def place(self, values: Any) -> int:
        """The address of these values, which stay where they are."""
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        self.keep.append(tensor)
        return tensor.data_ptr()

    def common(self, link: Link) -> dict[str, int]:
        """The fields that both ways have."""
        from ..kernels import inference as kernel

        bias = link.bias.new_zeros(_whole(len(link.bias), kernel.LANES))
        bias[: len(link.bias)] = link.bias
        return {
            "ROWS": len(link.weight), "BIAS": self.place(bias),
            "BOUNDS": self.place(np.array(link.bounds, np.float32)), "CURVE": getattr(kernel, link.curve),
        }  # fmt: skip

    def finish(self, size: int, numbers: list[int]) -> Program:
        """With the scratch memory and the program itself."""
        self.size, self.address = size, self.place(np.array(numbers, np.int64))
        return self


def columns(links: list[Link]) -> Program:
    """The program that goes through columns, sample by sample; `Unfit` where the chain has other layers than Linear."""
    from ..kernels import inference as kernel

    if any(link.weight.dim() != 2 or len(link.weight) >= 1 << 16 for link in links):
        raise Unfit("this way is for Linear layers of less than 65536 units")
    tables, size, program = Program(1), 0, list[int]()
    for link in links:
        units, plane = link.source[0], _whole(len(link.weight), kernel.LANES)
        record = {"POSITIONS": units, "TARGET": size, **tables.common(link)}
        if link.density > FULL:
            values = link.weight.new_zeros(units, plane)
            values[:, : len(link.weight)] = link.weight.t()
            program += _record(**record, WINDOW=1, PLANE=plane, VALUE=tables.place(values))
        else:
            column, row = link.weight.t().nonzero().unbind(1)
            count = torch.bincount(column, minlength=units)
            start = torch.zeros(units + 1, dtype=torch.int64)
            start[1:] = (-(-count // 4) * 4).cumsum(0)
            at = torch.arange(len(column)) + (start[:-1] - (count.cumsum(0) - count))[column]
            rows = np.full(int(start[-1]), len(link.weight), np.uint16)
            rows[at.numpy()] = row.numpy()
            values = link.weight.new_zeros(len(rows))
            values[at] = link.weight[row, column]
            program += _record(
                **record, START=tables.place(start.int()), OFFSET=tables.place(rows), VALUE=tables.place(values)
            )
        size += _whole(len(link.weight) + 1, kernel.LANES)
    widest, last = max(link.source[0] for link in links), _whole(links[-1].result[0] + 1, kernel.LANES)
    return tables.finish(
        size, [len(links), size, 1, links[0].source[0], 0, links[-1].result[0], size - last, widest, *program]
    )


def panels(links: list[Link], vectors: int) -> Program:
    """The program that goes through panels of so many vectors; `Unfit` where they take too much memory."""
    from ..kernels import inference as kernel

    margins = [link.padding for link in links] + [(0, 0)]
    shapes = [_image(links[0].source), *(link.pooled for link in links)]
    regions, size = [], 0
    for (c, h, w), (top, left) in zip(shapes, margins, strict=True):
        regions.append(size)
        size += c * (h + 2 * top) * (w + 2 * left)
    lines = vectors * kernel.LANES
    if size * lines * 4 > ROOM:
        raise Unfit("the activations take too much memory")
    tables, program = Program(vectors * kernel.LANES), list[int]()
    for i, link in enumerate(links):
        (_, _, w), (_, left) = shapes[i], margins[i]
        (_, high, wide), (down, right) = shapes[i + 1], margins[i + 1]
        offset, values, start = _gathers(link, regions[i])
        come, go, new, window = _windows(link, w + 2 * left, wide + 2 * right)
        go += regions[i + 1] + down * (wide + 2 * right) + right
        # each position once for every vector; the pixels of a window stay together
        number = np.cumsum(new) - 1
        order = np.argsort(np.tile(number, vectors) * vectors + np.repeat(range(vectors), len(new)), kind="stable")
        vector = np.repeat(np.arange(vectors), len(new))[order]
        come, go, new = (np.tile(a, vectors)[order] for a in (come, go, new))
        program += _record(
            **tables.common(link), START=tables.place(start), OFFSET=tables.place(offset * lines),
            VALUE=tables.place(values), POSITIONS=len(come), WINDOW=window,
            COME=tables.place(((come * vectors + vector) * kernel.LANES).astype(np.int32)),
            GO=tables.place(((go * vectors + vector) * kernel.LANES).astype(np.int32)),
            NEW=tables.place(new.astype(np.uint8)), PLANE=(high + 2 * down) * (wide + 2 * right) * lines,
        )  # fmt: skip
    ends = [_places(shapes[i], margins[i], regions[i]) for i in (0, -1)]
    size *= lines
    numbers = [
        len(links), size, vectors, len(ends[0]), tables.place(ends[0]), len(ends[1]), tables.place(ends[1]), 0,
        *program,
    ]  # fmt: skip
    return tables.finish(size, numbers)


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


def _gathers(link: Link, region: int) -> tuple[Tensor, Tensor, Tensor]:
    """(offset, value, start of each row) of the live weights: where each reads for the first position."""
    weight = link.weight if link.weight.dim() == 4 else link.weight[:, :, None, None]
    row, channel, down, right = live = weight.nonzero().unbind(1)
    start = torch.zeros(len(weight) + 1, dtype=torch.int32)
    start[1:] = torch.bincount(row, minlength=len(weight)).cumsum(0)
    channel = channel + row // (len(weight) // link.groups) * weight.shape[1]
    _, height, width = _image(link.source)
    high, wide = height + 2 * link.padding[0], width + 2 * link.padding[1]
    offset = (channel * high + down * link.dilation[0]) * wide + right * link.dilation[1]
    return (region + offset).int(), weight[live].contiguous(), start


def _windows(link: Link, come_wide: int, go_wide: int) -> tuple[Any, Any, Any, int]:
    """(where each position reads, where its window is written, whether it begins one, how the kernel pools)."""
    _, height, width = link.image
    kernel, stride, padding = link.pool or ((1, 1), (1, 1), (0, 0))
    _, rows, across = link.pooled
    y = np.arange(rows)[:, None] * stride[0] - padding[0] + np.arange(kernel[0])  # [rows, kernel]
    x = np.arange(across)[:, None] * stride[1] - padding[1] + np.arange(kernel[1])
    shape = rows, across, *kernel
    inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[None, :, None, :]
    come = y[:, None, :, None] * link.stride[0] * come_wide + x[None, :, None, :] * link.stride[1]
    go = np.arange(rows)[:, None, None, None] * go_wide + np.arange(across)[None, :, None, None]
    inside, come, go = (np.broadcast_to(a, shape).reshape(rows * across, -1) for a in (inside, come, go))
    new = inside & (np.cumsum(inside, 1) == 1)
    full = bool(inside.all())
    window = inside.shape[1] if full and inside.shape[1] in (1, 4) else 0
    return come[inside], go[inside], new[inside], window
