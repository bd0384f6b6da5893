"""Step sizes for the rows of a recipe, chosen on validation data.

    python experiments/tune.py mnist-mlp --rows "RigL" --grid lr=1e-3,3e-3,1e-2 --data-root DIR

trains each row that --rows finds once for every point of the grid, with a seed that no table uses, and adds the best
validation accuracy on target (of denoisers the SSIM) to experiments/results/tuning/NAME.json. What is there already is
not run again. No measure on test data is read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from reproduce.machine import describe_machine
from reproduce.recipes import find_recipes, read_experiment
from reproduce.results import named_now
from torch_bregman.files import write_atomically
from torch_bregman.train import Recipe, fit
from torch_bregman.train.errors import RunError

SEED = 100  # the tables have 0, 1, 2


def read_grid(points: list[str]) -> list[dict[str, Any]]:
    """Every combination of "option=value,value" texts."""
    axes = []
    for point in points:
        name, _, values = point.partition("=")
        axes.append([(name, json.loads(value)) for value in values.split(",")])
    return [dict(combination) for combination in itertools.product(*axes)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What has been tried so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def trial(recipe: Recipe, data_root: Path | None) -> dict[str, Any]:
    """What a run ends with on validation data, or why it failed; it may be in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            end = fit(recipe, Path(folder), data_root=data_root, quiet=True)
        except RunError as error:
            return {"failed": str(error)}
    return {key: end[key] for key in ("val_accuracy", "val_ssim", "density", "seconds") if key in end}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the recipe")
    parser.add_argument("--rows", default=".", help="a regular expression on the rows' methods [all]")
    parser.add_argument("--grid", nargs="+", required=True, metavar="OPTION=VALUE,…", help="what is tried")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trials at a time [1]")
    parser.add_argument("--data-root", type=Path, metavar="DIR")
    args = parser.parse_args()

    experiment = read_experiment(find_recipes(None) / f"{args.name}.toml")
    path = Path(__file__).parent / "results" / "tuning" / f"{args.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = [
        {"method": row.method, "options": row.options | point}
        for row in experiment.rows
        if re.search(args.rows, row.method)
        for point in read_grid(args.grid)
    ]
    tried = [{"method": row["method"], "options": named_now(row["options"])} for row in read_rows(path)]
    # Spawned, because a process that has used a GPU cannot be forked.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        trials = {
            pool.submit(trial, Recipe(**(label["options"] | {"seed": SEED})).check(), args.data_root): label
            for label in labels
            if label not in tried
        }
        for end in as_completed(trials):
            result = trials[end] | end.result()
            # Read again: another process may have added to it meanwhile.
            content = {"seed": SEED, "environment": describe_machine(), "rows": [*read_rows(path), result]}
            write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
