"""What stands beside a sparse layer: max-pooling that takes its layout, and a ReLU in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels import DTYPES
from .conv import max_pool2d
from .layers import WatchedLayer
from .watch import Watch


class WatchedPool(Watch):
    """A MaxPool2d: takes the batch-last output of a sparse convolution as it lies.

    torch's would copy it to another layout, which takes longer than the convolution.
    """

    def takes(self, x: Tensor) -> bool:
        """Whether x lies batch-last and the pooling is a plain one."""
        pool: Any = self.module
        plain = type(x) is Tensor and x.dim() == 4 and x.dtype in DTYPES and x.device.type == "cpu"
        if not plain or x.is_contiguous() or not x.permute(1, 2, 3, 0).is_contiguous():
            return False
        kernel, around = (v if isinstance(v, tuple) else (v, v) for v in (pool.kernel_size, pool.padding))
        ones = pool.dilation if isinstance(pool.dilation, tuple) else (pool.dilation,)
        small = all(2 * p <= k for p, k in zip(around, kernel, strict=True))
        return small and set(ones) == {1} and not pool.ceil_mode and not pool.return_indices

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor | None:
        """The pooling of x, or of relu(x)."""
        if torch.compiler.is_compiling() or not self.takes(x):
            return None
        pool: Any = self.module
        return max_pool2d(x, pool.kernel_size, pool.stride, pool.padding, relu=relu)


class WatchedSequential(Watch):
    """A Sequential: does a ReLU together with the sparse Linear before it, or with the MaxPool2d after it."""

    def __init__(
        self, module: nn.Sequential, layers: dict[nn.Module, WatchedLayer], pools: dict[nn.Module, WatchedPool]
    ) -> None:
        super().__init__(module)
        self.layers, self.pools = layers, pools

    def forward(self, x: Tensor) -> Tensor | None:
        if torch.compiler.is_compiling():
            return None
        children: list[nn.Module] = list(self.module._modules.values())  # type: ignore[arg-type]
        i = 0
        while i < len(children):
            y = self._pair(children[i], children[i + 1], x) if i + 1 < len(children) else None
            x = children[i](x) if y is None else y
            i += 1 if y is None else 2
        return x

    def _pair(self, first: nn.Module, second: nn.Module, x: Any) -> Tensor | None:
        layer, pool = self.layers.get(first), self.pools.get(second)
        if type(second) is nn.ReLU and layer is not None and layer.form.fuses_relu:
            return None if _hooked(first) or _hooked(second) else layer.forward(x, relu=True)
        if type(first) is nn.ReLU and pool is not None and pool.takes(x) and not _hooked(first) and not _hooked(second):
            return pool.forward(x, relu=True)
        return None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def sequentials(model: nn.Module, layers: list[WatchedLayer]) -> tuple[list[WatchedPool], list[WatchedSequential]]:
    """The max-poolings and the Sequentials of a network."""
    if not kernels.available():
        return [], []
    pools = [WatchedPool(m) for m in model.modules() if type(m) is nn.MaxPool2d and "forward" not in m.__dict__]
    by_module = {layer.module: layer for layer in layers}, {pool.module: pool for pool in pools}
    plain = [m for m in model.modules() if type(m) is nn.Sequential and "forward" not in m.__dict__]
    return pools, [WatchedSequential(m, *by_module) for m in plain]
