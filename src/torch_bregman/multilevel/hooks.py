"""Hooks of the user: on a weight they want the gradient of all of it; a pass that is only timed calls none."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR: Any = Tensor
_BACKWARD, _ACCUMULATED = _TENSOR._backward_hooks.__get__, _TENSOR._post_accumulate_grad_hooks.__get__


def hooked(parameter: Tensor) -> bool:
    """Whether somebody else wants to see or change the gradient of this parameter."""
    with torch._C.DisableTorchFunctionSubclass():  # it is asked in every step
        first, second = _BACKWARD(parameter), _ACCUMULATED(parameter)
    return bool(first and any(map(_foreign, first.values()))) or bool(second and any(map(_foreign, second.values())))


def looked_at(model: nn.Module) -> list[str]:
    """The names of the modules within it that have hooks."""
    return [
        name
        for name, module in model.named_modules()
        if module is not model and any(map(_foreign, _hooks(module.__dict__)))
    ]


def parts(model: nn.Module) -> list[tuple[dict[Any, Any], tuple[Any, ...]]]:
    """The children and hooks of all modules: where they are kept, and what is there now."""
    held = [module.__dict__[name] for module in model.modules() for name in ("_modules", *_OF_MODULES)]
    return [(members, tuple(members.values())) for members in held]


def _hooks(members: dict[str, Any]) -> list[Any]:
    return [hook for name in _OF_MODULES for hook in members[name].values()]


@contextmanager
def silent(model: nn.Module) -> Iterator[bool]:
    """Inside, hooks of the user on modules and gradients are there, but do nothing; whether there are any.

    torch's own that compute a weight before every call (weight_norm, spectral_norm, pruning) go on.
    """
    held: list[Any] = [getattr(every_module, f"_global{name}") for name in _OF_MODULES]
    held += [getattr(module, name) for module in model.modules() for name in _OF_MODULES]
    with torch._C.DisableTorchFunctionSubclass():
        held += [of(p) for p in model.parameters() for of in (_BACKWARD, _ACCUMULATED)]
    changed: list[tuple[MutableMapping[int, Any], dict[int, Any]]] = []
    for hooks in held:
        foreign = {key: hook for key, hook in (hooks or {}).items() if _foreign(hook)}
        if foreign:
            changed.append((hooks, foreign))
            hooks.update(dict.fromkeys(foreign, _nothing))
    try:
        yield bool(changed)
    finally:
        for hooks, foreign in changed:
            hooks.update(foreign)


def _foreign(hook: Any) -> bool:
    """Neither torch's nor this library's; those of a method of pruning of one's own are torch's."""
    ours = str(getattr(hook, "__module__", "")).startswith(("torch.", "torch_bregman."))
    return not ours and not any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What a hook does in the meantime."""
