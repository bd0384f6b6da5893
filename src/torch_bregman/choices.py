"""A name that must be one of several."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def choose(what: str, name: str, options: Iterable[str]) -> str:
    """`name` if it is one of `options`, else a ValueError that names the nearest."""
    known = list(options)
    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"Invalid `{what}`: {name!r}; expected one of {', '.join(map(repr, known))}{hint}")
