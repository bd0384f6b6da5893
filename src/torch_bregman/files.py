"""Files that are whole or not there: written to a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(
    path: Path, content: bytes | bytearray | Callable[[BinaryIO], None], *, shared: bool = False
) -> None:
    """Write `content` (or let it write) to PATH.tmp, flush it to the disk, and rename it to `path`.

    Whatever goes wrong, the file at `path` stays as it was and the temporary one is removed. `shared`: another process
    may write the same file at the same time, so the temporary name is one that no other has.

    Raises:
        OSError: the file could not be written.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp" if shared else f"{path.name}.tmp")
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
