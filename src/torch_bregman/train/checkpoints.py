"""Where a run is saved: in one file by a single process, in folders by several.

Folders are read and written with torch.distributed.checkpoint, which takes a second to import: only where they are
needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from .checksummed import latest_checkpoint, save_checkpoint
from .ranks import ONE_PROCESS, Processes

if TYPE_CHECKING:
    from .folders import Folders

Checkpoints: TypeAlias = "OneFile | Folders"


def checkpoints_of(run: Path, warn: Callable[[str], None], ranks: Processes) -> Checkpoints:
    """Where the run in the folder `run` is saved; `warn` is told what goes wrong without ending it."""
    if ranks.strategy == "none":
        return OneFile(run, warn)
    from .folders import Folders

    return Folders(run, warn, ranks)


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

            return latest(self.path.parent, ONE_PROCESS, model, optimizer, self.warn)[0]
        return latest_checkpoint(self.path, self.warn)

    def save(self, step: int, state: dict[str, Any], *, urgent: bool = False) -> None:
        """Write `state`, that of the run after `step` steps; RunError where that fails."""
        save_checkpoint(self.path, state)

    def look(self) -> None:
        """Nothing goes on in the background."""

    def wait(self) -> None:
        """Nothing goes on in the background."""
