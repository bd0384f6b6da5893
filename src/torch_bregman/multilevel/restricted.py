"""A weight of the model while the optimizer holds its live part, seen by those who look at it.

It is the same object, with another class. Its gradient is that of the live part: whoever clears it, clips it or sets
it does so to what the optimizer steps with. Whether it is trained is true of the live part too.

In a coarse phase a sparse layer never reads its matrix, and writing a few live values into a large one costs a cache
line each: a fifth of a step. So the values wait, and whatever touches the parameter from Python (reading, copying,
saving, changing it) writes them first. References that were taken before are the same object and do so too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_SHOWN = [
    "grad", "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "grad_fn", "is_cuda", "is_cpu",
    "is_sparse", "is_sparse_csr", "is_nested", "is_quantized", "is_meta", "is_mps", "is_xpu", "is_mkldnn",
    "retains_grad", "output_nr", "_version", "_backward_hooks", "_post_accumulate_grad_hooks",
]  # fmt: skip
_CALLED = [
    "size", "dim", "numel", "nelement", "stride", "is_contiguous", "element_size", "is_floating_point", "is_complex",
    "requires_grad_", "register_hook", "register_post_accumulate_grad_hook",
]  # fmt: skip
_TENSOR: Any = Tensor
#: What tells nothing about the entries.
_BLIND = frozenset(
    [getattr(_TENSOR, name).__get__ for name in _SHOWN if hasattr(_TENSOR, name)]
    + [getattr(_TENSOR, name) for name in _CALLED]
    + [_TENSOR.grad.__set__, _TENSOR.requires_grad.__set__, torch.numel, torch.is_floating_point, torch.is_complex]
)


class _Restricted:
    """Mixed in before the class of a parameter."""

    __dict__: dict[str, Any]

    @property
    def grad(self) -> Tensor | None:
        return self.__dict__["_live"].gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        self.__dict__["_live"].gradient = gradient

    @grad.deleter
    def grad(self) -> None:
        self.__dict__["_live"].gradient = None

    @property
    def requires_grad(self) -> bool:
        return own(self, "requires_grad")

    @requires_grad.setter
    def requires_grad(self, trained: bool) -> None:
        set_own(self, "requires_grad", trained)
        self.__dict__["_live"].values.requires_grad = trained

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            with _plain(self) as parameter:
                memo[id(self)] = parameter.__deepcopy__(memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        with _plain(self) as parameter:
            make, given, *more = parameter.__reduce_ex__(protocol)
            given = tuple({**x} if type(x) is dict else x for x in given)  # its attributes, which are read later
        return make, given, *more

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        with _plain(self) as parameter:
            return repr(parameter)


@functools.cache
def _restricted(base: type) -> type:
    return type(base.__name__, (_Restricted, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


class Waiting(_Restricted, nn.Parameter):  # type: ignore[misc]  # Tensor.__repr__ has no types
    """The class of a parameter while its values wait, see the top of this file."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _BLIND:
                for x in tree_leaves((args, kwargs)):
                    if type(x) is Waiting:
                        x.__dict__["_live"].flush()
            return func(*args, **(kwargs or {}))


@contextmanager
def _plain(parameter: Any) -> Iterator[Any]:
    """The parameter as it was before, up to date."""
    kind, live = type(parameter), parameter.__dict__["_live"]
    live.flush()
    _restore(parameter)
    try:
        yield parameter
    finally:
        parameter.__dict__["_live"] = live
        parameter.__class__ = kind


def _restore(parameter: Any) -> None:
    del parameter.__dict__["_live"]
    parameter.__class__ = class_of(parameter)


def class_of(parameter: Any) -> type:
    """The class that it has when it is not restricted."""
    return type(parameter).__mro__[2] if isinstance(parameter, _Restricted) else type(parameter)


def own(parameter: Any, name: str) -> Any:
    """What torch keeps as `name` of a parameter."""
    with torch._C.DisableTorchFunctionSubclass():
        return getattr(_TENSOR, name).__get__(parameter)


def set_own(parameter: Any, name: str, value: Any) -> None:
    """Set it."""
    with torch._C.DisableTorchFunctionSubclass():
        getattr(_TENSOR, name).__set__(parameter, value)


def begin(parameter: nn.Parameter, live: Any) -> None:
    """From now on the parameter shows the gradient of its live part."""
    parameter.__dict__["_live"] = live
    parameter.__class__ = _restricted(type(parameter))


def wait(parameter: nn.Parameter) -> bool:
    """From now on `live.flush()` is called before anything touches the parameter. False if it has its own class."""
    if type(parameter) is _restricted(nn.Parameter):
        parameter.__class__ = Waiting
    return type(parameter) is Waiting


def end(parameter: nn.Parameter) -> None:
    """An ordinary parameter again."""
    if isinstance(parameter, _Restricted):
        _restore(parameter)
