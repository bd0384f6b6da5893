"""A checkpoint in one file, with a checksum at its end and the one before beside it."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..files import write_atomically
from .errors import RunError, writing

DIGEST = 32  # bytes of SHA-256 at the end of a checkpoint


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) with a checksum; the checkpoint before stays beside it as *.previous."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    fresh = path.with_name(path.name + ".new")
    with writing(fresh):
        write_atomically(fresh, content + hashlib.sha256(content).digest())
    if path.exists():
        os.replace(path, previous(path))
    os.replace(fresh, path)


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(path.name + ".previous")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote; nothing in it is run. RunError, naming the file, if it is damaged."""
    content = path.read_bytes()
    body, digest = content[:-DIGEST], content[-DIGEST:]
    if hashlib.sha256(body).digest() != digest:
        raise RunError(f"The checkpoint {path} is damaged ({len(content):,} bytes, the checksum does not fit).")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def latest_checkpoint(path: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest undamaged checkpoint: `path`, else the one before it, else None where none was written yet."""
    damaged = None
    for candidate in (path.with_name(path.name + ".new"), path, previous(path)):
        if not candidate.exists():
            continue
        try:
            return load_checkpoint(candidate)
        except RunError as error:
            if candidate.suffix != ".new":
                warn(f"{error} Trying the one before.")
                damaged = error
    if damaged is not None:
        raise damaged
    return None
