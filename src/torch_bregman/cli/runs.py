"""Run folders: made, found again, and read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..train.errors import RunError
from ..train.recipe import Recipe


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder, or a RunError."""
    if not (run / "recipe.toml").exists():
        raise RunError(f"{run} is no run folder: there is no recipe.toml in it.")
    return Recipe.read(run / "recipe.toml")


def begun_before(out: Path | None, recipe: Recipe) -> Path | None:
    """The run folder that these processes had made before torchrun started them again, else None."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    for run in [out] if out is not None else sorted(Path("runs").glob("*"), key=os.path.getmtime, reverse=True):
        job = run / "torchrun"
        if job.exists() and job.read_text() == os.environ["TORCHELASTIC_RUN_ID"] and read_recipe(run) == recipe:
            return run
    return None


def new_run(out: Path | None, recipe: Recipe, data_root: Path | None, compare: bool) -> Path:
    """Make the run folder: `out`, or the first free name under runs/. One that holds something is left alone."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"The run folder {out} exists; go on with --resume {out}, or choose another --out.")
        run = out
    else:
        goal = f"{recipe.density:.4g}" if recipe.density else "dense" if recipe.lam is None else f"lam{recipe.lam:g}"
        data, model = (name.rpartition(":")[2] for name in (recipe.dataset, recipe.model))
        stem = f"{Path(data).stem}-{model}-{recipe.optimizer}-{goal}"
        number = 1
        while (run := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Could not make the run folder {run}: {error.strerror}.") from None
    if data_root is not None:
        (run / "data-root").write_text(str(data_root.resolve()))  # for --resume
    if "TORCHELASTIC_RUN_ID" in os.environ:
        (run / "torchrun").write_text(os.environ["TORCHELASTIC_RUN_ID"])  # for `begun_before`
    recipe.write(run / "recipe.toml")
    if compare:
        (run / "dense").mkdir()
        recipe.twin().write(run / "dense" / "recipe.toml")
    return run


def finished(run: Path) -> dict[str, Any] | None:
    """The last row of a run that has ended, else None."""
    try:
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        row = json.loads(last)
    except (OSError, IndexError, ValueError):
        return None
    return row if row.get("event") == "end" else None
