"""A name that must be one of several, or that says where a function of the user's own is."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """`name` if it is one of `options`, else a ValueError that names the nearest."""
    known = list(options)
    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"Invalid `{what}`: {name!r}; expected one of {', '.join(map(repr, known))}{hint}")


def imported(what: str, name: str) -> Callable[..., Any]:
    """The function that "package.module:function" names, else a ValueError."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"Invalid `{what}`: {name!r}; expected package.module:function ({error}).") from None


def told(error: Exception) -> str:
    """What went wrong in a function of the user's own, and in which line of it: the last one outside of packages."""
    text = " ".join(str(error).split())
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not _installed(frame.filename)]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}{f', {text}' if text else ''}{place}."


def _installed(file: str) -> bool:
    return "site-packages" in file or file.startswith("<") or Path(__file__).parent in Path(file).parents
