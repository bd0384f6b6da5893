"""A name that must be one of several, or that says where a function of the user's own is."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
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
    """The function that "package.module:function" names, else a ValueError.

    Modules of the current folder are found as with `python -m`, also by the command of an environment.
    """
    module, _, function = name.partition(":")
    here, at = os.getcwd(), f"Invalid `{what}`: {name!r}; "
    importlib.invalidate_caches()  # the file may be newer than the process
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # a module that it imports itself
            raise ValueError(f"{at}{told(error)}") from error
        raise ValueError(
            f"{at}expected package.module:function (No module named {error.name!r} in {here} or on the path of Python, "
            "PYTHONPATH)."
        ) from None
    except Exception as error:
        raise ValueError(f"{at}expected package.module:function; {told(error)}") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        problem = f"{module} has no {function!r}" if found is None else f"{function} is {type(found).__name__}"
        raise ValueError(f"{at}expected package.module:function, but {problem}.")
    return found


def called(what: str, name: str, *args: object) -> Any:
    """What the function "package.module:function" returns; what goes wrong in it is a ValueError with its line."""
    function = imported(what, name)
    try:
        return function(*args)
    except Exception as error:
        raise ValueError(f"Invalid `{what}`: {name!r}; {told(error)}") from error


def told(error: Exception) -> str:
    """What went wrong in a function of the user's own, and in which line of it: the last one outside of packages."""
    text = " ".join(str(error).split())
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not _installed(frame.filename)]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}{f', {text}' if text else ''}{place}."


def _installed(file: str) -> bool:
    return "site-packages" in file or file.startswith("<") or Path(__file__).parent in Path(file).parents
