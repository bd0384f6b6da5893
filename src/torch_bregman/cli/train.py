"""`torch-bregman train`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from ..data import DataError
from ..report import terminal_summary, write_report
from ..report.words import ON_TARGET, near
from ..train.errors import RunError, Stopped
from ..train.loop import fit
from ..train.ranks import TORCHRUN, start
from ..train.recipe import Recipe
from .app import app
from .runs import begun_before, finished, new_run, read_recipe


@dataclass(frozen=True)
class Options(Recipe):
    """A recipe as the command line has it: the data set stands first, and --dataset is for files of --config."""

    dataset: Annotated[str, Parameter(show=False)] = "digits"


@app.command
def train(
    dataset: str | None = None,
    /,
    *,
    options: Annotated[Options, Parameter(name="*")] = Options(),
    compare: bool = False,
    data_root: Path | None = None,
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    resume: Path | None = None,
    config: Path | None = None,
    quiet: bool = False,
    strategy: Literal["none", "ddp", "fsdp"] = "none",
    timeout: float = 600.0,
) -> None:
    """Train a sparse network on DATASET and write a run folder with metrics, checkpoints and report.html.

    The network starts with 1 % of its weights; the optimizer adds the ones that matter, until the density that
    was asked for is reached, exactly. Examples:

    * `torch-bregman train digits` - 5 % of the weights of a small network, in seconds, without a download.
    * `torch-bregman train mnist --density 0.02 --compare` - 2 %, beside the dense twin.
    * `torch-bregman train fashion-mnist --model convnet --regularizer group-l1` - whole kernels instead of entries.
    * `torch-bregman train mine.npz --model my_package.nets:make` - your arrays (x_train, y_train, …), your network.
    * `torch-bregman train --resume runs/mnist-mlp-adabreg-0.05` - go on after Ctrl-C, a crash or a power cut.
    * `torch-bregman train --config runs/mnist-mlp-adabreg-0.05/recipe.toml` - the same run again.
    * `torchrun --standalone --nproc-per-node 2 -m torch_bregman train mnist --strategy ddp` - on two GPUs, or in two
      processes on the CPU.

    Parameters
    ----------
    dataset
        digits, mnist, fashion-mnist, cifar10; a path: an .npz with your arrays, or a folder of images; or
        package.module:function of your own, which returns a dict of arrays as in such an .npz. [digits]
    compare
        Train the dense twin too, with Adam, and show both. Of its epochs the last is shown; RUN/dense has them all.
    data_root
        A folder that already holds the files, one folder per data set (DIR/mnist/train-images-idx3-ubyte.gz …), instead
        of downloading them.
    out
        The run folder; by default a new one under runs/.
    resume
        Go on with the run in this folder, bit for bit as if it had not stopped. Without a folder: the one of --out.
    config
        A TOML file with any of these options; options on the command line come before it.
    quiet
        One line per epoch instead of the live table.
    strategy
        Under torchrun: ddp (each process has the whole network) or fsdp (each has a part of every weight). Batches are
        shared out, so the result is that of one process. A run may go on with another strategy or number of processes.
    timeout
        With --strategy: seconds after which a process that does not answer is given up.
    """
    given = asdict(options) | ({"dataset": dataset} if dataset else {})
    recipe = read_recipe(resume) if resume else Recipe(**given).check()
    if dataset not in (None, recipe.dataset):
        raise RunError(f"The run {resume} is of {recipe.dataset}; --resume cannot go on with {dataset}.")
    with start(strategy, recipe, timeout) as ranks:
        run = ranks.on_first(lambda: resume or begun_before(out, recipe) or new_run(out, recipe, data_root, compare))
        if data_root is None and (run / "data-root").exists():
            data_root = Path((run / "data-root").read_text())
        how: dict[str, Any] = {"data_root": data_root, "quiet": quiet, "ranks": ranks}
        try:
            end = ranks.on_first(lambda: finished(run)) or fit(recipe, run, title=title(recipe), **how)
            if ranks.on_first(lambda: (compare or (run / "dense").exists()) and not finished(run / "dense")):
                twin = recipe.twin()
                fit(twin, run / "dense", title=f"dense twin: {title(twin)}", brief=True, **how)
        except (DataError, ValueError):
            if resume is None and ranks.first and not (run / "metrics.jsonl").exists():
                shutil.rmtree(run)  # it was new, and nothing was trained in it
            raise
        except Stopped as stopped:
            if ranks.first:
                write_report(run)
                again = f"torch-bregman train --resume {run}"
                if strategy != "none":
                    again = f"{TORCHRUN} train --resume {run} --strategy {strategy}"
                Console().print(f"{stopped} Go on with: {again}", highlight=False, soft_wrap=True)
            sys.exit(130)
    if not ranks.first:
        return
    console = Console()
    write_report(run)
    console.print(terminal_summary(run))
    if end["asked_density"] is not None and not near(end["density"], end["asked_density"]):
        console.print(
            f"The density is off by more than {100 * ON_TARGET:g} %: whole groups are as near as it gets, or "
            "epochs are too few."
        )


def title(recipe: Recipe) -> str:
    """One line that says what is being trained."""
    if recipe.optimizer in ("adam", "sgd"):
        goal = "dense"
    else:
        goal = f"{recipe.regularizer}, " + (f"{recipe.density:.4g}" if recipe.density else f"λ {recipe.lam:g}")
        if recipe.conv_density:
            goal += f", Conv {recipe.conv_density:.4g}"
    return f"{recipe.dataset} · {recipe.model} · {recipe.optimizer} lr {recipe.lr:g} · {goal}"
