"""Standing between a module and its calls.

The class of a module is exchanged for a subclass, so that its name, its parameters, its hooks and `isinstance` stay
what they are. Copies and pickles of it are of the stock class.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


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


class _Watched:
    """Mixed in before the class of a module. A module that is made of the class, a slice of a Sequential, is plain."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name != "_watch"}
        return object.__new__, (type(self).__mro__[2],), state


@functools.cache
def _watched(base: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(base.forward)  # others read its arguments from it
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        watch = self.__dict__.get("_watch")
        y = None if watch is None else watch.forward(*args, **kwargs)
        return base.forward(self, *args, **kwargs) if y is None else y

    members = {"forward": forward, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_Watched, base), members)
