"""How a run ends before its end: a sentence for the person who started it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunError(Exception):
    """Something a person can act on; the command line prints it as one sentence."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The run was interrupted and has saved its state."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RunError where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Could not write {path}: {error.strerror or error}; what was there before is untouched."
        ) from None
