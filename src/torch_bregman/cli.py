"""The command line: `torch-bregman train mnist --density 0.05`, and what is done with the network afterwards."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

try:
    import cyclopts
    from cyclopts import App, Parameter
    from rich.console import Console
    from rich.text import Text
except ImportError:
    sys.exit("The command line needs its extra: pip install 'torch-bregman[train]'.")

import torch
from torch import Tensor, nn

from . import __version__
from .data import DataError, Dataset, load
from .models import build
from .report import terminal_summary, write_report
from .report.words import near
from .train.denoising import Denoising
from .train.errors import RunError, Stopped, writing
from .train.evaluation import evaluate
from .train.loop import fit
from .train.ranks import TORCHRUN, start
from .train.recipe import Recipe

REFRESH = 2  # times a second; more would disturb what is timed
EXPERIMENTS = Path(__file__).parents[2] / "experiments"  # of a clone
SAMPLES = 64  # that stand for the inputs of a network when it is shrunk, exported or timed

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
    * `torch-bregman train --resume runs/mnist-mlp-5%` - go on after Ctrl-C, a crash or a power cut.
    * `torch-bregman train --config runs/mnist-mlp-5%/recipe.toml` - the same run again.
    * `torchrun --standalone --nproc-per-node 2 -m torch_bregman train mnist --strategy ddp` - on two GPUs, or in two
      processes on the CPU.

    Parameters
    ----------
    dataset
        digits, mnist, fashion-mnist, cifar10; a path: an .npz with your arrays, or a folder of images; or
        package.module:function of your own, which returns a dict of arrays as in such an .npz.
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
    strategy
        Under torchrun: ddp (each process has the whole network) or fsdp (each has a part of every weight). Batches are
        shared out, so the result is that of one process. A run may go on with another strategy or number of processes.
    timeout
        With --strategy: seconds after which a process that does not answer is given up.
    """
    recipe = read_recipe(resume) if resume else replace(recipe, dataset=dataset or recipe.dataset).check()
    if dataset not in (None, recipe.dataset):
        raise RunError(f"The run {resume} is of {recipe.dataset}; --resume cannot go on with {dataset}.")
    with start(strategy, recipe, timeout) as ranks:
        run = ranks.on_first(lambda: resume or begun_before(out, recipe) or new_run(out, recipe, data_root, compare))
        if data_root is None and (run / "data-root").exists():
            data_root = Path((run / "data-root").read_text())
        options: dict[str, Any] = {"data_root": data_root, "quiet": quiet, "ranks": ranks}
        try:
            end = ranks.on_first(lambda: finished(run)) or fit(recipe, run, title=title(recipe), **options)
            if ranks.on_first(lambda: (compare or (run / "dense").exists()) and not finished(run / "dense")):
                twin = recipe.twin()
                fit(twin, run / "dense", title=f"dense twin: {title(twin)}", **options)
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


@app.command
def shrink(run: Path, /, *, out: Annotated[Path | None, Parameter(alias="-o")] = None) -> None:
    """Cut what the network of a run does not use, and write the smaller one, which computes the same.

    Neurons and filters without weights, and all that belongs to them, are left out; the table says what went, and why
    the rest had to stay. Single weights that are zero stay zeros in the layers, and take no bytes in the file.

    The file is read back with `tb.load_sparse(model, FILE)`, where `model` is a fresh network as it was trained:
    it becomes the small one.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    out
        The file to write. [RUN/shrunk.safetensors]
    """
    from .export.save import save_sparse
    from .shrink import shrink as shrunk

    done = trained(run)
    path = writable(out or run / "shrunk.safetensors")
    small = shrunk(done.model, (done.inputs,))
    with writing(path):
        saved = save_sparse(small.model, path)
    print(f"{small.report}\n")
    before = done.weights.stat().st_size
    print(f"{done.weights}: {before:,} bytes, {before / saved.bytes:.1f} times as many as the file written.")
    print(saved)


@app.command
def export(
    run: Path,
    /,
    *,
    format: Literal["onnx", "program", "sparse"] = "onnx",
    out: Annotated[Path | None, Parameter(alias="-o")] = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
) -> None:
    """Write the network of a run as a file for other programs, checked to compute the same.

    onnx and program hold the shrunk network, with zeros where single weights are zero; the batch may have any size.

    * `torch-bregman export RUN` - ONNX, for onnxruntime and many others: RUN/model.onnx. Needs the extra 'export'.
    * `torch-bregman export RUN --format program` - for PyTorch without your code, with torch.export.load:
      RUN/model.pt2.
    * `torch-bregman export RUN --format sparse --dtype float16` - the network as it was trained, zeros left out and the
      rest in half the bytes, for tb.load_sparse: RUN/sparse.safetensors.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    format
        onnx, program (torch.export) or sparse.
    out
        The file to write.
    dtype
        What the values of a sparse file are rounded to. [as trained]
    """
    from .export.formats import save_onnx, save_program
    from .export.save import save_sparse
    from .shrink import shrink as shrunk

    if dtype is not None and format != "sparse":
        raise RunError(f"--dtype rounds the values of --format sparse; --format {format} keeps them as trained.")
    done = trained(run)
    path = writable(out or run / {"onnx": "model.onnx", "program": "model.pt2", "sparse": "sparse.safetensors"}[format])
    if format == "sparse":
        with writing(path):
            print(save_sparse(done.model, path, dtype=getattr(torch, dtype) if dtype else None))
        return
    with Console().status(f"exporting and checking {path}", refresh_per_second=REFRESH):
        small = shrunk(done.model, (done.inputs,)).model
        try:
            with writing(path):
                (save_onnx if format == "onnx" else save_program)(small, done.inputs, path)
        except ImportError as error:
            raise RunError(str(error)) from None
    print(f"{path}: {path.stat().st_size:,} bytes, the same outputs at every batch size that was tried")


@app.command
def bench(
    run: Path,
    /,
    *,
    rounds: int = 30,
    batch: str = "1,64",
    rivals: bool = True,
) -> None:
    """Prove what the sparse network of a run is worth: accuracy, size and speed beside the dense one, in one table.

    The network is shrunk and made fast for this machine, its accuracy is measured again, and it is timed against the
    dense network in PyTorch, with torch.compile and in ONNX Runtime, in turn and in random order. The dense network is
    the twin of `train --compare`; without one its size and speed are those of the same network with random weights.
    Where the sparse network loses, the table says so. Writes RUN/proof.json, and the table into RUN/report.html.

    * `torch-bregman bench RUN` - the whole sheet, in a minute or two; a large network takes longer.
    * `torch-bregman bench RUN --no-rivals --rounds 10` - a quick look, against dense PyTorch only.
    * `torch-bregman bench RUN --batch 1` - as one sample after the other comes in.

    Parameters
    ----------
    run
        The folder of a run that has ended.
    rounds
        How often each network is timed; more rounds steady the figures.
    batch
        Batch sizes to time, with commas between them.
    rivals
        Also torch.compile and ONNX Runtime (extra 'export').
    """
    from .proof import prove

    try:
        batches = tuple(int(part) for part in batch.split(","))
    except ValueError:
        raise RunError(
            f"Invalid --batch {batch}: expected whole numbers with commas between them, as in 1,64."
        ) from None
    done = trained(run)
    end, recipe = finished(run) or {}, done.recipe
    twin, notes = None, []
    if (run / "dense").is_dir():
        if (last := finished(run / "dense")) is None:
            notes.append(f"the dense twin has not been trained to its end: torch-bregman train --resume {run}")
        else:
            twin = trained(run / "dense", done.data)
    if recipe.precision != "32":
        notes.append(f"trained in {recipe.precision}, measured here in float32")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)

    measure = "test_accuracy" if "test_accuracy" in end else "test_loss"
    denoising = Denoising.of(done.model, done.data, recipe)

    def score(model: nn.Module) -> float:
        scores = evaluate(model, done.data.test, denoising, nullcontext, {})
        return scores[measure.replace("test_", "val_")]

    # What was measured when the runs ended stands; what was made of the network since is measured now.
    known: dict[str, Any] = {"sparse": end.get(measure), "shrunk": score, "optimized": score}
    if twin is not None and last is not None:
        known["dense"] = last.get(measure)
    console = Console()
    with console.status("", refresh_per_second=REFRESH) as status:
        proof = prove(
            twin.model if twin is not None else None, done.model, done.inputs, accuracy=known,
            measure=measure.replace("_", " "), rounds=rounds, batches=batches, rivals=rivals, progress=status.update,
        )  # fmt: skip
    proof = replace(proof, notes=(*proof.notes, *notes))
    path = run / "proof.json"
    with writing(path):
        proof.write(path)
    report_path = write_report(run)
    console.print(proof)
    print(f"{path}\n{report_path}")


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
    if not EXPERIMENTS.is_dir():
        raise RunError(
            "The tables, their recipes and what runs them are not part of the installed package: clone the repository, "
            "and install it there with pip install -e '.[train]'."
        )
    if str(EXPERIMENTS) not in sys.path:
        sys.path.insert(0, str(EXPERIMENTS))
    return importlib.import_module(module)


@dataclass(frozen=True)
class Trained:
    """The network of a run that has ended, with the weights that were kept, in eval mode on the CPU."""

    recipe: Recipe
    data: Dataset
    model: nn.Module
    weights: Path

    @property
    def inputs(self) -> Tensor:
        """Samples of the validation data."""
        return self.data.validation.x[:SAMPLES]


def trained(run: Path, data: Dataset | None = None) -> Trained:
    """Load what a run has made; RunError where there is nothing, or where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    recipe = read_recipe(run)
    if finished(run) is None:
        raise RunError(f"The run {run} has not ended; go on with: torch-bregman train --resume {run}")
    weights = next((path for name in ("best", "last") if (path := run / f"{name}.safetensors").is_file()), None)
    if weights is None:
        raise RunError(f"There are no weights in {run}: neither best.safetensors nor last.safetensors.")
    if data is None:
        root = run / "data-root"
        data = load(recipe.dataset, Path(root.read_text()) if root.exists() else None, limit=recipe.limit)
    model = build(recipe.model, data.shape, len(data.classes))
    try:
        tensors = load_file(weights)
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except (SafetensorError, OSError) as error:
        raise RunError(f"The weights {weights} are damaged: {error}") from None
    except RuntimeError as error:
        raise RunError(f"The weights {weights} do not fit the model {recipe.model}: {error}") from None
    # Of tied tensors one is in the file.
    state = model.state_dict()
    there = {state[name].data_ptr() for name in tensors if name in state}
    missing = [name for name in missing if state[name].numel() and state[name].data_ptr() not in there]
    if missing or unknown:
        name = [*missing, *unknown][0]
        raise RunError(f"The weights {weights} are not those of the model {recipe.model}: {name} is in one only.")
    return Trained(recipe, data, model.eval(), weights)


def writable(path: Path) -> Path:
    """`path`, or a RunError before the work that would be lost."""
    if path.is_dir():
        raise RunError(f"Cannot write {path}: it is a folder; --out names a file.")
    if not path.parent.is_dir():
        raise RunError(f"Cannot write {path}: there is no folder {path.parent}.")
    if not os.access(path.parent, os.W_OK):
        raise RunError(f"Cannot write {path}: the folder {path.parent} is read-only.")
    return path


def title(recipe: Recipe) -> str:
    """One line that says what is being trained."""
    if recipe.optimizer in ("adam", "sgd"):
        goal = "dense"
    else:
        goal = f"{recipe.regularizer}, " + (f"{recipe.density:.4g}" if recipe.density else f"λ {recipe.lam:g}")
        if recipe.conv_density:
            goal += f", Conv {recipe.conv_density:.4g}"
    return f"{recipe.dataset} · {recipe.model} · {recipe.optimizer} lr {recipe.lr:g} · {goal}"


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
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    return Text.assemble(("Error: ", "bold red"), rank, " ".join(text.split()))


if __name__ == "__main__":
    main()
