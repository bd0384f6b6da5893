"""The links of a chain: a Linear or Conv2d with what follows it, in tensors and numbers, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[int, int]


class Unfit(Exception):  # noqa: N818 - it says what the layer is
    """A module that no chain takes, and why."""


@dataclass
class Link:
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
    batched: bool = True  # whether samples lie in the first dimension alone; else in all but the last
    active: bool = False
    nodes: list[str] = field(default_factory=list)

    @property
    def density(self) -> float:
        return torch.count_nonzero(self.weight).item() / max(1, self.weight.numel())


def _begin(name: str, module: nn.Module, shape: tuple[int, ...]) -> Link:
    """The link that `module` begins for samples of this shape; `Unfit` where there is none."""
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
            raise Unfit(f"the input ends in {shape}, not in {module.in_features} features")
        out = module.out_features
        return Link(name, [module], weight, bias, shape, (out,), (out, 1, 1), pooled=(out, 1, 1))
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
    return Link(
        name, [module], weight, bias, shape, image, image, stride, padding, dilation, module.groups, pooled=image
    )


def sample(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape of a sample where `x` comes into a chain that begins with `module`: of a token before a Linear."""
    return tuple(x.shape[-1:] if isinstance(module, nn.Linear) else x.shape[1:])


def of_rows(modules: Iterable[nn.Module]) -> bool:
    """Whether a chain treats every row by itself, in however many dimensions the rows lie."""
    return not any(isinstance(module, nn.Conv2d | nn.Flatten) for module in modules)


def follow(link: Link, module: nn.Module) -> None:
    """Let the link do what `module` does to its result; `Unfit` where it cannot."""
    if hooked(module):
        raise Unfit("the module has hooks")
    if isinstance(module, (nn.Dropout, nn.Identity)):
        pass
    elif (
        type(module) is nn.Flatten
        and link.batched
        and module.start_dim == 1
        and (module.end_dim in (-1, len(link.result)))
    ):
        link.result = (math.prod(link.result),)
    elif type(module) is nn.MaxPool2d:
        kernel = _pair(module.kernel_size)
        stride, padding = _pair(kernel if module.stride is None else module.stride), _pair(module.padding)
        if link.pool or len(link.result) != 3 or _pair(module.dilation) != (1, 1):
            raise Unfit("this pooling is not fused")
        if module.ceil_mode or module.return_indices or link.curve in ("SILU", "GELU") or link.bounds[2] < 0:
            raise Unfit("this pooling is not fused")
        link.pool = kernel, stride, padding
        link.pooled = (link.image[0], *_positions(link.image[1:], kernel, stride, padding))
        link.result = link.pooled
    elif type(module) in ACTIVATIONS and not link.active:
        link.curve, link.bounds = ACTIVATIONS[type(module)](module)
        link.active = True
    else:
        raise Unfit(f"{type(module).__name__} is not fused")
    link.modules.append(module)


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


def links_of(modules: list[nn.Module], shape: tuple[int, ...]) -> list[Link]:
    """The modules one after the other as links; `Unfit` if they are no chain."""
    found: list[Link] = []
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
