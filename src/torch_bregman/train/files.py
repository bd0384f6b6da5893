"""Checkpoints with a checksum, and files that could not be written as one sentence."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from .. import files

DIGEST = 32  # bytes of SHA-256 at the end of a checkpoint


class RunError(Exception):
    """Something a person can act on; the command line prints it as one sentence."""


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """As `torch_bregman.files.write_atomically`; RunError where the file could not be written."""
    try:
        files.write_atomically(path, content)
    except OSError as error:
        raise RunError(
            f"Could not write {path}: {error.strerror or error}; what was there before is untouched."
        ) from None


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) with a checksum; the checkpoint before stays beside it as *.previous."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    fresh = path.with_name(path.name + ".new")
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


class OneFile:
    """The checkpoint of a single process: `run`/checkpoint.pt. Reads those of several, too; see `folders.Folders`."""

    def __init__(self, run: Path, warn: Callable[[str], None]) -> None:
        self.path, self.warn = run / "checkpoint.pt", warn

    def __enter__(self) -> OneFile:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def last(self) -> Path | None:
        """The last good checkpoint."""
        return self.path if self.path.exists() else None

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """What was saved last and is undamaged; None where nothing was, RunError where all of it is damaged."""
        if any(self.path.parent.glob("checkpoint/step-*")):
            from .folders import latest
            from .ranks import ALONE

            return latest(self.path.parent, ALONE, model, optimizer, self.warn)[0]
        return latest_checkpoint(self.path, self.warn)

    def save(self, step: int, state: dict[str, Any], *, urgent: bool = False) -> None:
        """Write `state`, that of the run after `step` steps; RunError where that fails."""
        save_checkpoint(self.path, state)

    def look(self) -> None:
        """Nothing goes on in the background."""

    def wait(self) -> None:
        """Nothing goes on in the background."""
