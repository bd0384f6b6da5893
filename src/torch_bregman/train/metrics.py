"""metrics.jsonl: a row per epoch, and one at the end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .errors import RunError, writing


class Metrics:
    """metrics.jsonl, and the same as TensorBoard events where TensorBoard is installed."""

    def __init__(self, run: Path, rows: list[dict[str, Any]], *, silent: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self.board: Any = None
        self.silent = silent
        if silent:
            return
        # What a killed run wrote after its last checkpoint is written again by the resumed one.
        with writing(self.path):
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=len(rows) or None)

    def add(self, row: dict[str, Any]) -> None:
        if self.silent:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"Could not write {self.path}: {error.strerror}.") from None
        if self.board is not None:
            step = row.get("epoch") or row.get("best_epoch") or 0
            for name, value in row.items():
                if isinstance(value, int | float) and name not in ("epoch", "best_epoch"):
                    self.board.add_scalar(name, value, step)
            for name, value in row.get("layers", {}).items():
                self.board.add_scalar(f"density/{name}", value, step)
            self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
