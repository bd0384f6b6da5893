"""What `torch-bregman reproduce` does; its options are described in `torch_bregman.cli.reproduce`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from torch_bregman.choices import choose
from torch_bregman.train.errors import RunError, Stopped

from .page import overview, page_folder, write_page
from .recipes import QUICK_WARNING, find_recipes, read_experiments
from .results import read_results
from .running import reproduce


def run(
    name: str | None, *, every: bool, rows: str, seeds: tuple[int, ...], jobs: int, quick: bool, plots: bool,
    page: bool, data_root: Path | None, out: Path | None, recipes: Path | None,
) -> None:  # fmt: skip
    """List what there is, or run the table `name` or `every` one, and write the page."""
    recipes = find_recipes(recipes)
    experiments = read_experiments(recipes)
    results = out or (None if quick else recipes.parent / "results")
    if sum((name is not None, every, page)) > 1:
        raise RunError("NAME, --all and --page exclude each other.")
    if name is not None:
        choose("name", name, experiments)
    console = Console(highlight=False)
    if name is None and not every and not page:
        folder = results or recipes.parent / "results"
        found = read_results(folder) if folder.is_dir() else {}
        console.print(listing(overview(experiments, found)))
        return
    if quick:
        console.print(QUICK_WARNING, style="bold red", soft_wrap=True)
    command = "torch-bregman reproduce {}" + (f" --rows {shlex.quote(rows)}" if rows else "")
    command += f" --seeds {' '.join(map(str, seeds))}" + f" --jobs {jobs}" * (jobs > 1) + " --quick" * quick
    for chosen in [] if page else [name] if name is not None else experiments:
        experiment = experiments[chosen]
        if every and not quick and (device := experiment.missing_device()) is not None:
            print(f"{chosen} is passed over: it needs a device {device!r}, which this machine does not have.")
            continue
        try:
            reproduce(
                experiment, results, seeds=seeds, only=rows, jobs=jobs, quick=quick, data_root=data_root,
                command=command.replace("{}", chosen, 1) + " --data-root DIR" * (data_root is not None),
                say=lambda text: print(text, flush=True),
            )  # fmt: skip
        except Stopped as stopped:
            print(stopped)
            sys.exit(130)
    if quick:
        console.print(QUICK_WARNING, style="bold red", soft_wrap=True)
    if results is not None:
        print(write_page(page_folder(recipes, results), experiments, results, plots=plots))


def listing(rows: list[list[str]]) -> Table:
    """What can be reproduced, as a table of the terminal."""
    whole = max((len(name) for name, *_ in rows), default=0)  # a name is there to be copied
    table = Table(Column("name", min_width=whole), "task", "published", "ours", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
