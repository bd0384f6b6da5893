"""Says which extra to install where one is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turns an ImportError of the block into one that names the extra."""
    try:
        yield
    except ImportError as error:
        name = error.name or "a package"
        raise ImportError(f'{name} is needed here: pip install "torch-bregman[{extra}]"', name=error.name) from error
