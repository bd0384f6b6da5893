"""What trains in a process of its own, so that the peak of its memory is its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from torch_bregman.data import DataError
from torch_bregman.files import write_atomically
from torch_bregman.train import Recipe, fit
from torch_bregman.train.errors import RunError, Stopped, writing

from .machine import peak_memory


def main(root: str, *runs: str) -> None:
    """Train in the folders `runs`, which hold a recipe.toml each, with the data in `root`, and leave result.json there.

    It stops, and saves its state, when its standard input ends: with the process that started it, whatever ends that.
    """
    alone = threading.Event()

    def stop_with_parent() -> None:
        os.read(0, 1)  # ends with the parent
        alone.set()
        signal.raise_signal(signal.SIGTERM)  # the training loop saves its state and raises Stopped

    threading.Thread(target=stop_with_parent, daemon=True).start()
    for folder in map(Path, runs):
        if alone.is_set():
            sys.exit(130)
        recipe = Recipe.read(folder / "recipe.toml")
        try:
            end = fit(recipe, folder, data_root=Path(root) if root else None, quiet=True)
        except Stopped:
            sys.exit(130)
        except (RunError, DataError, ValueError, ImportError) as error:  # of any other the traceback is in the log
            sys.exit(" ".join(str(error).split()))
        epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]
        result: dict[str, Any] = {
            "end": end,
            "memory": peak_memory(recipe) if len(runs) == 1 else None,
            "threads": torch.get_num_threads(),
        }
        result["curve"] = {
            key: [row[key] for row in epochs]
            for key in ("val_accuracy", "val_ssim", "val_loss", "density", "l1_norm")
            if key in epochs[0]
        }
        result["dense_flops"] = end["dense_flops"]
        with writing(folder / "result.json"):
            write_atomically(folder / "result.json", json.dumps(result).encode())
        for path in folder.iterdir():  # checkpoints are large, and no longer needed
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in ("result.json", "recipe.toml", "log.txt"):
                path.unlink()
