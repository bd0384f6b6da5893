"""The command line: `torch-bregman train mnist --density 0.05`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

try:
    import cyclopts
    from cyclopts import App, Parameter
    from rich.console import Console
    from rich.text import Text
except ImportError:
    sys.exit("The command line needs its extra: pip install 'torch-bregman[train]'.")

from . import __version__
from .data import DataError
from .report import terminal_summary, write_report
from .report.words import near
from .train.files import RunError
from .train.loop import Stopped, fit
from .train.recipe import Recipe

app = App(
    name="torch-bregman",
    version=__version__,
    help="Train neural networks sparse from the first step with Bregman iterations.",
)


@app.command
def train(
    dataset: str | None = None,
    /,
    *,
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008 - frozen
    compare: bool = False,
    data_root: Path | None = None,
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    resume: Path | None = None,
    config: Path | None = None,
    quiet: bool = False,
) -> None:
    """Train a sparse network on DATASET and write a run folder with metrics, checkpoints and report.html.

    The network starts with 1 % of its weights; the optimizer adds the ones that matter, until the density that
    was asked for is reached, exactly. Examples:

    * `torch-bregman train digits` - 5 % of the weights of a small network, in seconds, without a download.
    * `torch-bregman train mnist --density 0.02 --compare` - 2 %, beside the dense twin.
    * `torch-bregman train fashion-mnist --model convnet --regularizer group-l1` - whole kernels instead of entries.
    * `torch-bregman train mine.npz --model my_package.nets:make` - your arrays (x_train, y_train, …), your network.
    * `torch-bregman train --resume runs/mnist-mlp-5%` - go on after Ctrl-C, a crash or a power cut.
    * `torch-bregman train --config runs/mnist-mlp-5%/recipe.toml` - the same run again.

    Parameters
    ----------
    dataset
        digits, mnist, fashion-mnist, cifar10, or a path: an .npz with your arrays, or a folder of images.
    compare
        Train the dense twin too, with Adam, and show both.
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
    """
    if resume is not None:
        run, recipe = resume, read_recipe(resume)
        if dataset not in (None, recipe.dataset):
            raise RunError(f"The run {run} is of {recipe.dataset}; --resume cannot go on with {dataset}.")
        if data_root is None and (run / "data-root").exists():
            data_root = Path((run / "data-root").read_text())
        compare = compare or (run / "dense").exists()
    else:
        recipe = replace(recipe, dataset=dataset or recipe.dataset).check()
        run = new_run(out, recipe)
        if data_root is not None:
            (run / "data-root").write_text(str(data_root.resolve()))  # for --resume
        recipe.write(run / "recipe.toml")
        if compare:
            (run / "dense").mkdir()
            recipe.twin().write(run / "dense" / "recipe.toml")
    console = Console()
    try:
        end = finished(run) or fit(recipe, run, data_root=data_root, quiet=quiet, title=title(recipe))
        if compare and not finished(run / "dense"):
            twin = recipe.twin()
            fit(twin, run / "dense", data_root=data_root, quiet=quiet, title=f"dense twin: {title(twin)}")
    except (DataError, ValueError):
        if resume is None and not (run / "metrics.jsonl").exists():
            shutil.rmtree(run)  # it was new, and nothing was trained in it
        raise
    except Stopped as stopped:
        write_report(run)
        console.print(f"{stopped} Go on with: torch-bregman train --resume {run}", highlight=False, soft_wrap=True)
        sys.exit(130)
    write_report(run)
    console.print(terminal_summary(run))
    if end["asked_density"] is not None and not near(end["density"], end["asked_density"]):
        console.print(
            "The density is off by more than 2 %: whole groups are as near as it gets, or epochs are too few."
        )


@app.command
def report(run: Path, /) -> None:
    """Write RUN/report.html again from the files of a run folder, also of one that is still training.

    Parameters
    ----------
    run
        The run folder.
    """
    read_recipe(run)
    path = write_report(run)
    Console().print(terminal_summary(run))
    print(path)


def title(recipe: Recipe) -> str:
    """One line that says what is being trained."""
    if recipe.optimizer in ("adam", "sgd"):
        goal = "dense"
    else:
        goal = f"{recipe.regularizer}, " + (f"{recipe.density:.4g}" if recipe.density else f"λ {recipe.lam:g}")
    return f"{recipe.dataset} · {recipe.model} · {recipe.optimizer} lr {recipe.lr:g} · {goal}"


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder, or a RunError."""
    if not (run / "recipe.toml").exists():
        raise RunError(f"{run} is no run folder: there is no recipe.toml in it.")
    return Recipe.read(run / "recipe.toml")


def new_run(out: Path | None, recipe: Recipe) -> Path:
    """Make the run folder: `out`, or the first free name under runs/. One that holds something is left alone."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise RunError(f"The run folder {out} exists; go on with --resume {out}, or choose another --out.")
        run = out
    else:
        goal = f"{recipe.density:.4g}" if recipe.density else "dense" if recipe.lam is None else f"lam{recipe.lam:g}"
        stem = f"{Path(recipe.dataset).stem}-{recipe.model.rpartition(':')[2]}-{recipe.optimizer}-{goal}"
        number = 1
        while (run := Path("runs") / (stem if number == 1 else f"{stem}-{number}")).exists():
            number += 1
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Could not make the run folder {run}: {error.strerror}.") from None
    return run


def finished(run: Path) -> dict[str, Any] | None:
    """The last row of a run that has ended, else None."""
    import json

    try:
        last = (run / "metrics.jsonl").read_text().splitlines()[-1]
        row = json.loads(last)
    except (OSError, IndexError, ValueError):
        return None
    return row if row.get("event") == "end" else None


def expand_resume(argv: list[str]) -> list[str]:
    """Let `--resume` stand alone: it then means the folder of --out."""
    if "--resume" not in argv:
        return argv
    i = argv.index("--resume")
    if i + 1 < len(argv) and not argv[i + 1].startswith("-"):
        return argv
    folder = next((argv[k + 1] for k, a in enumerate(argv[:-1]) if a in ("--out", "-o")), None)
    folder = folder or next((a.partition("=")[2] for a in argv if a.startswith("--out=")), None)
    if folder is None:
        raise RunError("--resume needs the run folder: torch-bregman train --resume runs/NAME.")
    return [*argv[:i], "--resume", folder, *argv[i + 1 :]]


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors a person can act on are one sentence and exit code 1, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        argv = expand_resume(argv)
        for i, word in enumerate(argv):
            path = word.partition("=")[2] if word.startswith("--config=") else None
            if word == "--config" and i + 1 < len(argv):
                path = argv[i + 1]
            if path is not None:
                if not Path(path).is_file():
                    raise RunError(f"The file {path} of --config does not exist.")
                app.config = [cyclopts.config.Toml(path, must_exist=True, use_commands_as_keys=False)]
        app(argv)
    except (RunError, DataError, ValueError) as error:
        errors.print(_error(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        sys.exit(130)
    except OSError as error:
        errors.print(_error(f"{error.strerror or error}: {error.filename or ''}"))
        sys.exit(1)


def _error(text: str) -> Text:
    return Text.assemble(("Error: ", "bold red"), " ".join(text.split()))


if __name__ == "__main__":
    main()
