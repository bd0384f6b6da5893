"""Files that are whole or not there: written to a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, content: bytes | bytearray | Callable[[BinaryIO], None]) -> None:
    """Write `content` (or let it write) to PATH.tmp, flush it to the disk, and rename it to `path`.

    Whatever goes wrong, the file at `path` stays as it was and the temporary one is removed.

    Raises:
        OSError: the file could not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
