"""A weight that is brought up to date when somebody looks at it.

In a coarse phase a sparse layer never reads its matrix, and writing a few live values into a large one costs a cache
line each: a fifth of a step. So the values wait, and whatever touches the parameter from Python (reading, copying,
saving, changing it) writes them first. References that were taken before are the same object and do so too.
"""

from __future__ import annotations

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


class Waiting(nn.Parameter):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        if id(self) not in memo:
            memo[id(self)] = nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, proto: Any) -> Any:
        self.__dict__["_live"].flush()
        return _plain(self).__reduce_ex__(proto)  # type: ignore[no-untyped-call]


def _plain(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), parameter.requires_grad)


def wait(parameter: nn.Parameter, live: Any) -> bool:
    """From now on `live.flush()` is called before anything touches the parameter. False if it has its own class."""
    if type(parameter) is not nn.Parameter:
        return False
    parameter.__dict__["_live"] = live
    parameter.__class__ = Waiting
    return True


def end(parameter: nn.Parameter) -> None:
    """An ordinary parameter again."""
    if type(parameter) is Waiting:
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]
        del parameter.__dict__["_live"]
