"""Layers that compute with their live weights alone while they are restricted, and as ever otherwise.

The class of a module is exchanged for a subclass, so that its name, its parameters, its hooks and `isinstance` stay
what they are. Copies and pickles of it are of the stock class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import kernels
from ..kernels import DTYPES
from ..part import Part
from . import waiting
from .conv import ConvPattern, max_pool2d, sparse_conv2d
from .csr import Pattern, sparse_linear


class Seen(NamedTuple):
    """An input of a layer: its shape, how it lies in memory, and whether a gradient with respect to it is needed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    needs_grad: bool


@dataclass(frozen=True)
class Form:
    """How a kind of module computes with a weight that is given to it, dense or as the values on a pattern.

    `whole`: whether the sparse form can add the gradient of the whole weight on the way back.
    `relu`: whether it can do a ReLU that follows in the same pass.
    """

    name: str
    pattern: Callable[[Tensor, Tensor | None], Any]
    dense: Callable[[Any, Tensor, Tensor], Tensor]
    sparse: Callable[[Any, Tensor, Tensor, Any, nn.Parameter | None, Any, bool], Tensor]
    whole: bool
    relu: bool


def _sparse_linear(
    module: Any,
    x: Tensor,
    values: Tensor,
    pattern: Pattern,
    whole: nn.Parameter | None,
    near: Pattern | None,
    relu: bool,
) -> Tensor:
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    y = sparse_linear(flat, values, module.bias, pattern, whole=whole, near=near, relu=relu)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], -1)


def _sparse_conv(
    module: Any,
    x: Tensor,
    values: Tensor,
    pattern: ConvPattern,
    whole: nn.Parameter | None,
    near: ConvPattern | None,
    relu: bool,
) -> Tensor:
    return sparse_conv2d(
        x, values, module.bias, pattern, module.stride, module.padding, module.dilation, module.groups, near=near
    )


FORMS: dict[Any, Form] = {
    nn.Linear.forward: Form(
        name="Linear",
        pattern=Pattern,
        dense=lambda module, x, weight: F.linear(x, weight, module.bias),
        sparse=_sparse_linear,
        whole=True,
        relu=True,
    ),
    nn.Conv2d.forward: Form(
        name="Conv2d",
        pattern=ConvPattern,
        dense=lambda module, x, weight: module._conv_forward(x, weight, module.bias),
        sparse=_sparse_conv,
        whole=False,
        relu=False,
    ),
}


def form_of(module: nn.Module) -> Form | None:
    """The sparse form of a module that computes as torch's own does; None where there is none."""
    form = FORMS.get(getattr(type(module), "forward", None))
    if form is None or "forward" in module.__dict__ or type(module._parameters.get("weight")) is not nn.Parameter:
        return None
    if isinstance(module, nn.Conv2d):
        around, sizes = module.padding, zip(module.dilation, module.kernel_size, strict=True)
        even = around != "same" or all(d * (k - 1) % 2 == 0 for d, k in sizes)
        return form if module.padding_mode == "zeros" and even else None
    return form


class Live:
    """A weight W in the full space and its live part, which the optimizer trains in its place.

    Entries `near` the threshold may be trained along: their v moves with their gradient, but W stays zero there until
    the optimizer has W again.

    Attributes:
        full: W. Always holds the live values, and zeros elsewhere.
        pattern: the live entries or groups of W.
        near: further entries, or None.
        entries: the pattern that a layer computes with, entry by entry.
        where: both, one after the other.
        values: of `where`; as long as W is restricted, those of `near` are not looked at.
        finished: the optimizer holds W again, and its gradient is that of all of W.
        version: of W when it was last written here; another one says that somebody else wrote to it.
        stale: the values have moved on since W was written; it is brought up to date when somebody looks at it.
    """

    def __init__(self, full: nn.Parameter, pattern: Part, near: Part | None = None, entries: Any = None) -> None:
        self.full, self.pattern, self.near = full, pattern, near
        self.entries = pattern if entries is None else entries
        self.where = pattern
        if near is not None:
            self.where = Part(full, (), torch.cat([pattern.index, near.index]))
        where = self.where
        self.plain = full.detach()  # W, for those who know what they do
        self.values = nn.Parameter(where.restrict(full))
        self.finished = self.stale = self.waits = False
        self.version = full._version
        self._hook: Any = full.register_post_accumulate_grad_hook(self._receive)  # type: ignore[no-untyped-call]

    def _receive(self, full: Tensor) -> None:
        """Take over the gradient that a dense computation has left."""
        grad, full.grad = full.grad, None
        assert grad is not None
        part = self.where.restrict(grad)
        self.values.grad = part if self.values.grad is None else self.values.grad.add_(part)

    def wait(self) -> None:
        """Nobody reads W in the steps to come: write it only when somebody does."""
        self.waits = waiting.wait(self.full, self)

    def write(self) -> None:
        """The values, to where they belong in W."""
        self.stale = True
        if not self.waits:
            self.flush()

    def flush(self) -> None:
        """Bring W up to date."""
        if self.stale:
            self.stale = False
            with torch.no_grad():
                self.pattern.prolong(self.values.detach()[: len(self.pattern)], self.plain)
            self.version = self.plain._version

    def read(self) -> None:
        """The values, from W."""
        self.values.detach()[: len(self.pattern)].copy_(self.pattern.restrict(self.plain))
        self.version = self.plain._version

    def edited(self, *, closely: bool = False) -> bool:
        """Whether W was changed from outside; `closely` compares the values too, which finds changes of `.data`."""
        if self.plain._version != self.version:
            return True
        if not closely or self.stale:
            return False
        return not torch.equal(self.pattern.restrict(self.plain), self.values.detach()[: len(self.pattern)])

    def finish(self) -> None:
        """Leave gradients where they belong; the values stay for those that still compute with them."""
        self.flush()
        waiting.end(self.full)
        self.waits = False
        self._hook.remove()
        self.finished = True


class Watch:
    """Stands between a module and its calls: `forward` may answer them, or return None for the module to do it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base: type[nn.Module] = type(module)

    def watch(self) -> None:
        """From now on the module's calls come here."""
        self.module.__dict__["_watch"] = self
        self.module.__class__ = _watched(self.base)  # type: ignore[arg-type]

    def release(self) -> None:
        """Make the module what it was."""
        self.module.__dict__.pop("_watch", None)
        self.module.__class__ = self.base


class Layer(Watch):
    """A module with a sparse form: which input it saw last, and how it computes now.

    Attributes:
        seen: the last input; None before the first call, and where the sparse form could not have taken it.
        work: floating-point operations of its forward pass in the last training call, 2 · weights · positions.
        live: the weights that it computes with; None where it computes as ever.
        on_training: called before every training call.
        on_edit: called when W was changed from outside, before it is used.
    """

    def __init__(
        self, name: str, module: nn.Module, form: Form, on_training: Callable[[], None], on_edit: Callable[[], None]
    ) -> None:
        super().__init__(module)
        self.weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
        self.name, self.form, self.on_training, self.on_edit = name, form, on_training, on_edit
        self.seen: Seen | None = None
        self.work = 0.0
        self._size = 2.0 * self.weight.numel()
        self.live: Live | None = None

    def forward(self, x: Tensor, *, relu: bool = False) -> Tensor | None:
        """What the sparse form, with `relu` followed by one, makes of x; None where the module computes as ever."""
        module: Any = self.module
        weight = module._parameters["weight"]
        if torch.compiler.is_compiling() or type(x) is not Tensor:
            return None
        dtype = weight.dtype if self.live is None else self.live.plain.dtype
        training = torch.is_grad_enabled()
        if training:
            self.on_training()
            self.work = self._size * self._positions(x)
        fits = kernels.available() and x.dtype == dtype and x.dtype in DTYPES and x.device.type == "cpu" and x.dim() > 1
        if not fits or torch.is_autocast_enabled("cpu"):
            self.seen = None
            return None
        if training and self.live is None and (self.seen is None or x.numel() >= math.prod(self.seen.shape)):
            self.seen = Seen(tuple(x.shape), x.stride(), x.requires_grad)
        if self.live is None or self.live.full is not weight:
            return None
        if self.live.edited(closely=not training):
            self.on_edit()
            if self.live is None or self.live.edited(closely=not training):
                return None
        live = self.live
        if not training or not live.finished:
            return self.form.sparse(module, x, live.values.flatten(), live.entries, None, live.near, relu)
        if not self.form.whole:
            return None
        return self.form.sparse(module, x, live.values.detach().flatten(), live.entries, weight, live.near, relu)

    def _positions(self, x: Tensor) -> int:
        """At how many places of x the weights are applied."""
        module: Any = self.module
        if not isinstance(module, nn.Conv2d):
            return x.numel() // max(x.shape[-1], 1)
        count = len(x)
        for d in (0, 1):
            around = module.padding if isinstance(module.padding, str) else module.padding[d]
            reach = module.dilation[d] * (module.kernel_size[d] - 1)
            pad = {"same": reach, "valid": 0}.get(around, 0) if isinstance(around, str) else 2 * around
            count *= max(0, (x.shape[2 + d] + pad - reach - 1) // module.stride[d] + 1)
        return count


class Pool(Watch):
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


class Chain(Watch):
    """A Sequential: does a ReLU together with the sparse Linear before it, or with the MaxPool2d after it."""

    def __init__(self, module: nn.Sequential, layers: dict[nn.Module, Layer], pools: dict[nn.Module, Pool]) -> None:
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
        if type(second) is nn.ReLU and layer is not None and layer.form.relu:
            return None if _hooked(first) or _hooked(second) else layer.forward(x, relu=True)
        if type(first) is nn.ReLU and pool is not None and pool.takes(x) and not _hooked(first) and not _hooked(second):
            return pool.forward(x, relu=True)
        return None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def chains(model: nn.Module, layers: list[Layer]) -> tuple[list[Pool], list[Chain]]:
    """The max-poolings and the Sequentials of a network."""
    if not kernels.available():
        return [], []
    pools = [Pool(m) for m in model.modules() if type(m) is nn.MaxPool2d and "forward" not in m.__dict__]
    by_module = {layer.module: layer for layer in layers}, {pool.module: pool for pool in pools}
    plain = [m for m in model.modules() if type(m) is nn.Sequential and "forward" not in m.__dict__]
    return pools, [Chain(m, *by_module) for m in plain]


class _Watched:
    """Mixed in before the class of a module. A module that is made of the class, a slice of a Sequential, is plain."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.__dict__.get("_watch")
        y = None if watch is None else watch.forward(*args, **kwargs)
        return super().forward(*args, **kwargs) if y is None else y  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_watch"}
        return object.__new__, (type(self).__mro__[2],), state


@functools.cache
def _watched(base: type[nn.Module]) -> type[nn.Module]:
    return type(base.__name__, (_Watched, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})
