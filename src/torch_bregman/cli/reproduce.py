"""`torch-bregman reproduce`, which experiments/ of the clone does."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

from cyclopts import Parameter

from ..train.errors import RunError
from .app import app

EXPERIMENTS = Path(__file__).parents[3] / "experiments"  # of a clone


@app.command
def reproduce(
    name: str | None = None,
    /,
    *,
    all: bool = False,
    rows: str = "",
    seeds: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (0, 1, 2),
    jobs: int = 1,
    quick: bool = False,
    plots: bool = False,
    page: bool = False,
    data_root: Path | None = None,
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    recipes: Path | None = None,
) -> None:
    """Run a table or figure of the papers again, and show the published figures beside ours.

    Without NAME: what there is, published and ours. Each NAME is a recipe file in experiments/recipes of the clone;
    the command runs its rows over the seeds, writes experiments/results/NAME.json and docs/results.md anew.
    Interrupted, the same command goes on: runs that have ended are kept in OUT/.reproduce until all have.

    * `torch-bregman reproduce` - the list.
    * `torch-bregman reproduce mnist-mlp --quick` - whether it works here, in a minute or two; its figures mean nothing.
    * `torch-bregman reproduce mnist-mlp --data-root DIR --plots` - the real thing, with a PNG.
    * `torch-bregman reproduce mnist-mlp --rows "RigL|SET"` - some rows, the others stay as they are.

    Parameters
    ----------
    name
        The table or figure.
    all
        Every one; those that need a device this machine lacks are passed over.
    rows
        A regular expression: only the rows in whose method it is found are run.
    seeds
        One run per row and seed.
    jobs
        So many runs at a time: as many as there are cores where each takes one, or as the memory of a GPU holds. They
        slow each other, and the seconds of the table with them.
    quick
        Few samples, one epoch, the first seed. Written only where --out says, and never over real results.
    plots
        Also a PNG per table beside docs/results.md: accuracy and density over the epochs, or the architecture found.
    page
        Run nothing: only write docs/results.md anew from the result files.
    data_root
        A folder that already holds the data sets, one folder each, instead of downloading them.
    out
        The folder of the result files. [experiments/results of the clone]
    recipes
        The folder of the recipe files. [experiments/recipes of the clone]
    """
    from_clone("reproduce.command").run(
        name, every=all, rows=rows, seeds=seeds, jobs=jobs, quick=quick, plots=plots, page=page, data_root=data_root,
        out=out, recipes=recipes,
    )  # fmt: skip


def from_clone(module: str) -> ModuleType:
    """A module of experiments/, which lies beside src/ in a clone; RunError where the package was installed alone."""
    if not (EXPERIMENTS / "reproduce").is_dir():
        raise RunError(
            "The tables, their recipes and what runs them are not part of the installed package: clone the repository, "
            "and install it there with pip install -e '.[train]'."
        )
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    return importlib.import_module(module)
