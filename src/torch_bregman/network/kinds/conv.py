"""Convolutions of one to three dimensions, grouped and depthwise ones too, and transposed ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..operations import differs
from .base import Exchange, Kept, Options, register
from .weighted import WeightedSum

ARGUMENTS = ("in_channels", "out_channels", "kernel_size")
OPTIONS: Options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True, "padding_mode": "zeros"}


class Convolution(WeightedSum):
    in_training = True
    counts = ("out_channels", "in_channels")

    def __init__(self, module_class: type[nn.Module], dims: int) -> None:
        super().__init__(module_class)
        self.arguments, self.options, self.dims = ARGUMENTS, OPTIONS, dims

    def groups(self, module: Any) -> int:
        return module.groups

    def positions(self, module: Any, x: torch.Size) -> int:
        """Those of the output, of all samples."""
        n = len(module.kernel_size)
        count = math.prod(x[: -n - 1])
        for d, size in enumerate(x[-n:]):
            around = module.padding if isinstance(module.padding, str) else 2 * module.padding[d]
            reach = module.dilation[d] * (module.kernel_size[d] - 1)
            pad = {"same": reach, "valid": 0}[around] if isinstance(around, str) else around
            count *= max(0, (size + pad - reach - 1) // module.stride[d] + 1)
        return count

    def dense(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_miscomputed(module, weight):
            down, right = module.stride
            return F.conv2d(x[..., ::down, ::right], weight, bias, groups=module.groups)
        return module._conv_forward(x, weight, bias)

    def channels(self, module: Any, shape: tuple[int, ...]) -> int | None:
        return 1 if len(shape) == 2 + len(module.kernel_size) else None

    def padded(self, module: Any) -> bool:
        """Whether there are zeros beyond the border; the other paddings continue a constant."""
        padding = module.padding
        return module.padding_mode == "zeros" and (padding == "same" or (padding != "valid" and differs(padding, 0)))

    def constant_image(self, module: Any, weight: Tensor, x: Tensor, positions: tuple[int, ...]) -> Tensor:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(positions) - 1]
        image = x.view(1, -1, *[1] * len(positions)).expand(1, -1, *positions)
        return convolve(image, weight, None, module.stride, module.padding, module.dilation)[0]

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        if self.mixes(module):
            super().cut(module, kept, exchange)
            return
        if kept.outputs is None:
            return
        for name in ("weight", "bias"):
            exchange(name, kept.outputs)
        module.groups = module.groups * len(kept.outputs) // module.out_channels
        module.out_channels, module.in_channels = len(kept.outputs), module.groups * module.weight.shape[1]

    def factors(self, module: Any, rank: int) -> tuple[Any, Any] | None:
        """Into `rank` channels, and from there with a kernel of one position."""
        if self.dims != 2 or module.groups > 1 or module.padding_mode != "zeros":
            return None
        options: Any = {"device": module.weight.device, "dtype": module.weight.dtype}
        where = (module.kernel_size, module.stride, module.padding, module.dilation)
        first = nn.Conv2d(module.in_channels, rank, *where, bias=False, **options)
        return first, nn.Conv2d(rank, module.out_channels, 1, bias=module.bias is not None, **options)


class TransposedConvolution(Convolution):
    """Its weight lies as [inputs, outputs / groups, *kernel]. It is cut where it has one group."""

    in_training = False
    rows_are_outputs = False
    needs_carrier = True

    def __init__(self, module_class: type[nn.Module], dims: int) -> None:
        super().__init__(module_class, dims)
        self.options = {**OPTIONS, "output_padding": 0}

    def fan_in(self, module: Any, name: str) -> float:
        # With a stride it spreads its kernel over several outputs.
        return super().fan_in(module, name) / math.prod(module.stride)

    def positions(self, module: Any, x: torch.Size) -> int:
        """Those of the input, of all samples."""
        n = len(module.kernel_size)
        return math.prod(x[: -n - 1]) * math.prod(x[-n:])

    def channels(self, module: Any, shape: tuple[int, ...]) -> int | None:
        return None if module.groups > 1 else super().channels(module, shape)

    def padded(self, module: Any) -> bool:
        return True  # positions are reached by different parts of the kernel

    def factors(self, module: Any, rank: int) -> tuple[Any, Any] | None:
        return None


def is_miscomputed(module: nn.Module, weight: Tensor) -> bool:
    """Whether oneDNN, on the CPU, may get the gradient of this weight wrong, or crash, on channels-last images.

    Of a strided 1×1 convolution of fewer channels than a vector register takes (16 float32) it writes past its
    workspace (its issue 6035). Networks become that narrow here: the shortcuts of a ResNet with few live filters.
    """
    if not isinstance(module, nn.Conv2d) or weight.device.type != "cpu":
        return False
    strided = module.stride != (1, 1) and module.padding in ((0, 0), "valid")
    return strided and weight.shape[1] < 16 and weight.shape[2:] == (1, 1)


def gains_by_channels_last(model: nn.Module) -> bool:
    """Whether it has convolutions of images, and all of them are right in this layout."""
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    return bool(found) and not any(is_miscomputed(module, module.weight) for module in found)


for _dims, _conv, _transposed in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    register(Convolution(_conv, _dims))
    register(TransposedConvolution(_transposed, _dims))
# Of classes that are derived from these.
for _base in (Convolution(_ConvNd, 0), TransposedConvolution(_ConvTransposeNd, 0)):
    _base.arguments = None
    register(_base)
