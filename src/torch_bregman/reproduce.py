"""The published tables beside ours: recipe files in, result files and docs/results.md out.

A recipe file is TOML: title, task, source, [shared] options of a run, and [[rows]], each with a method (its label), its
own options and what was published. Every run trains in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import __version__
from .choices import choose
from .data import DataError, load
from .density import density as density_of
from .files import write_atomically
from .init import sparse_init_
from .models.resnet import ResNet
from .report.architecture import draw_architectures
from .report.curves import draw_curves, family
from .report.words import percent
from .train.errors import RunError, Stopped, writing
from .train.loop import fit, pick_device
from .train.recipe import OPTIMIZERS, RIVALS, Recipe

QUICK: dict[str, Any] = {"epochs": 1, "limit": 1000}
QUICK_WARNING = "--quick: few samples, one epoch, one seed. These figures prove that the path works, and mean nothing."
KINDS = ("train", "variance")
OPTIONS = tuple(f.name for f in fields(Recipe) if f.name != "seed")
VARIANCE_OPTIONS = ("nonlinearity", "correction", "density", "depth", "width", "samples")
PUBLISHED = ("accuracy", "ssim", "density", "note", "source")
PICTURES = ("curves", "architecture")
FLOPS = (
    "of training, in the Linear and Conv layers: a dense step takes 3 · 2 · weights · positions per sample (forward, "
    "gradient of the inputs, gradient of the weights); where only live weights are computed with, that times their "
    "share. Zeros that are multiplied count in full."
)
SPARSE_FLOPS = (
    "the same if no zero cost anything: a step takes 3 · 2 · live weights · positions per sample, and 2 · 2 · live + "
    "2 · all where it needs the gradient of all weights: every step of LinBreg, AdaBreg and ProxSGD, the fine steps of "
    "multilevel training, the steps at which RigL grows."
)
MEMORY = (
    "the largest resident set of the process that trained (ru_maxrss), with Python, torch and the data in it; on a GPU "
    "the most that torch had allocated there."
)
MADE = ("seeds", "command", "environment")  # how a row was made
LABELS = ("method", "move", "rule")  # what the rows of result files are called by

Say = Callable[[str], None]


# ---------------------------------------------------------------------- recipe files


@dataclass(frozen=True)
class Row:
    """A line of a table: how it is made, and what was published. All but texts are fractions."""

    method: str
    options: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def unknown(self) -> str | None:
        """The optimizer, where this version has none of that name."""
        name = self.options.get("optimizer", "adabreg")
        return None if name in OPTIMIZERS else str(name)


@dataclass(frozen=True)
class Experiment:
    """A recipe file, read and checked."""

    name: str
    title: str
    task: str
    source: str
    kind: str
    picture: str
    rows: tuple[Row, ...]
    shared: dict[str, Any]
    quick: dict[str, Any]

    def missing_device(self) -> str | None:
        """The kind of device that the rows need and this machine lacks."""
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        needed = {str(row.options.get("device", "auto")).partition(":")[0] for row in self.rows}
        return next((device for device in sorted(needed) if not there.get(device, True)), None)


def read_experiment(path: Path) -> Experiment:
    """The recipe file `path`.

    Raises RunError, naming the file and the row, for what is no TOML, an unknown key or option, or a bad value. An
    optimizer that this version does not know is no error: its rows are skipped when they are run.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"Cannot read the recipe {path}: {error}.") from None
    where = f"The recipe {path}"
    try:
        for key in content:
            choose("key", key, ("title", "task", "source", "kind", "picture", "shared", "quick", "rows"))
        for key in ("title", "task", "source"):
            if not isinstance(content.get(key), str):
                raise ValueError(f"Invalid `{key}`: {content.get(key)!r}; expected a text.")
        kind = choose("kind", content.get("kind", "train"), KINDS)
        picture = choose("picture", content.get("picture", "curves"), PICTURES)
        known = OPTIONS if kind == "train" else VARIANCE_OPTIONS
        shared, quick, tables = content.get("shared", {}), content.get("quick", {}), content.get("rows")
        for name, table in (("shared", shared), ("quick", quick)):
            if not isinstance(table, dict):
                raise ValueError(f"Invalid `{name}`: {table!r}; expected a table.")
            for option in table:
                choose("option", option, known)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError("There are no [[rows]] in it.")
        rows: list[Row] = []
        for table in tables:
            method = table.get("method")
            where = f"The recipe {path}, row {method!r}"
            if not isinstance(method, str) or method in (row.method for row in rows):
                raise ValueError(f"Invalid `method`: {method!r}; expected a text that no other row has.")
            rows.append(_read_row(table, kind, known, shared, quick))
    except (ValueError, TypeError) as error:
        raise RunError(f"{where}: {error}") from None
    return Experiment(
        path.stem, content["title"], content["task"], content["source"], kind, picture, tuple(rows), shared,
        (QUICK if kind == "train" else {}) | quick,
    )  # fmt: skip


def _read_row(
    table: dict[str, Any], kind: str, known: Sequence[str], shared: dict[str, Any], quick: dict[str, Any]
) -> Row:
    published = table.get("published", {})
    if not isinstance(published, dict):
        raise ValueError(f"Invalid `published`: {published!r}; expected a table.")
    for key, value in published.items():
        choose("published", key, PUBLISHED)
        good = isinstance(value, str) if key in ("note", "source") else type(value) in (int, float) and 0 <= value <= 1
        if not good:
            raise ValueError(f"Invalid `published.{key}`: {value!r}; fractions in [0, 1] and texts are expected.")
    own = {key: value for key, value in table.items() if key not in ("method", "published")}
    for option in own:
        choose("option", option, known)
    defaults = {f.name: f.default for f in fields(Recipe)}
    for option, value in (shared | own | quick).items():
        kind_of = type(defaults.get(option))
        if kind_of in (str, bool) and type(value) is not kind_of:
            raise ValueError(
                f"Invalid `{option}`: {value!r}; expected a {'text' if kind_of is str else 'true or false'}."
            )
    row = Row(table["method"], shared | own, published)
    if kind == "variance":
        variance_settings(row.options | quick)
    elif row.unknown is None:
        Recipe(**row.options).check()
        Recipe(**(row.options | QUICK | quick)).check()
    return row


def find_recipes(folder: Path | None) -> Path:
    """`folder`, or the one of the clone this package lies in; RunError where there is none."""
    if folder is None:
        folder = Path(__file__).parents[2] / "experiments" / "recipes"
        if not folder.is_dir():
            raise RunError(
                "The recipes are not part of the installed package: clone the repository and install it with "
                "pip install -e, or name their folder with --recipes."
            )
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}; --recipes names the one with the recipe files (*.toml).")
    return folder


def read_experiments(folder: Path) -> dict[str, Experiment]:
    """All recipe files of `folder`, by name."""
    found = {path.stem: read_experiment(path) for path in sorted(folder.glob("*.toml"))}
    if not found:
        raise RunError(f"There are no recipe files (*.toml) in {folder}.")
    return found


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files of `folder`, by name; RunError for one that is damaged."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise RunError(f"Cannot read the result file {path}: {error}") from None
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise RunError(f"The result file {path} has no rows.")
        results[path.stem] = content
    return results


# ---------------------------------------------------------------------- running


def reproduce(
    experiment: Experiment,
    out: Path | None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    only: str = "",
    quick: bool = False,
    data_root: Path | None = None,
    command: str = "",
    jobs: int = 1,
    say: Say = print,
) -> dict[str, Any]:
    """Run every row of `experiment` over the `seeds` and write OUT/NAME.json; returns what is in it.

    With `only`, a regular expression, just the rows in whose method it is found; the others stay in the file as they
    are, and a row that was made elsewhere carries its own seeds, command and environment.

    `jobs` runs train at a time, each in a process of its own; the seconds of a run are then those beside the others.

    Runs that have ended are kept in OUT/.reproduce until all have, and are not run again by the next call with the same
    options, version and machine; one that was stopped goes on from its checkpoint. With `quick`: one seed, the options
    of the [quick] table, nothing is kept, and `out` may be None.

    Raises:
        RunError: the device that is needed is not there, a run failed, `only` finds no row, or `quick` would overwrite
            real results.
        Stopped: after Ctrl-C; what has been done so far is kept.
    """
    seeds = check_seeds(seeds)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(f"Invalid `jobs`: {jobs!r}; expected a whole number of at least 1.")
    if quick:
        seeds = seeds[:1]
        refuse_to_overwrite(experiment, out)
    elif (missing := experiment.missing_device()) is not None:
        raise RunError(
            f"{experiment.name} was not run: it needs a device {missing!r}, which this machine does not have. "
            "--quick tries its path without."
        )
    elif out is None:
        raise ValueError("Invalid `out`: None; only with `quick` may nothing be written.")
    wanted = [row for row in experiment.rows if matches(only, row.method)]
    if not wanted:
        raise RunError(f"{experiment.name} has no row in which {only!r} is found.")
    rows = [row for row in wanted if experiment.kind != "train" or row.unknown is None]
    skipped = [row for row in wanted if row not in rows]
    for row in skipped:
        say(f"skipped: {row.method} (this version has no optimizer {row.unknown!r})")
    if not rows:
        raise RunError(f"{experiment.name} has no row that this version can run.")

    say(f"{experiment.name}: {experiment.title}")
    if any("ssim" in row.published for row in rows) and find_spec("skimage") is None:
        say("There will be no SSIM: it needs the extra experiments, pip install 'torch-bregman[experiments]'.")
    environment = describe_machine()
    if experiment.kind == "variance":
        results = [variance_row(row, experiment.quick if quick else {}, seeds, say) for row in rows]
    elif quick:
        with tempfile.TemporaryDirectory() as temporary:
            results = _train(experiment, rows, seeds, Path(temporary), data_root, environment, say, quick=True)
    else:
        assert out is not None
        state = _state_folder(out, experiment.name)
        results = _train(experiment, rows, seeds, state, data_root, environment, say, jobs=jobs)
    content: dict[str, Any] = {
        "recipe": {"name": experiment.name, "title": experiment.title, "task": experiment.task,
                   "source": experiment.source, "shared": experiment.shared, "all else": "defaults of torch-bregman"},
        "command": command or f"torch-bregman reproduce {experiment.name}",
        "environment": environment,
        "seeds": list(seeds),
        "rows": results,
    }  # fmt: skip
    if only and out is not None and not quick:
        content["rows"] = merged(experiment, out, content)
    if skipped:
        content["skipped"] = [row.method for row in skipped]
    if quick:
        content = {"quick": True, "warning": QUICK_WARNING, **content}
    if out is not None:
        _make_folder(out)
        with writing(out / f"{experiment.name}.json"):
            write_atomically(out / f"{experiment.name}.json", (json.dumps(content, indent=1) + "\n").encode())
        say(f"→ {out / f'{experiment.name}.json'}")
        if not quick:
            shutil.rmtree(out / ".reproduce" / experiment.name, ignore_errors=True)
    return content


def matches(pattern: str, method: str) -> bool:
    """Whether the regular expression `pattern` is found in `method`; RunError where it is none."""
    try:
        return re.search(pattern, method) is not None
    except re.error as error:
        raise RunError(f"Invalid `rows`: {pattern!r}; expected a regular expression ({error}).") from None


def merged(experiment: Experiment, out: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `content` among those that OUT/NAME.json has already, in the order of the recipe.

    A row that was made in another way than `content` says keeps its seeds, command and environment. One whose options
    are no longer those of the recipe is left out.
    """
    old = read_results(out).get(experiment.name, {}) if out.is_dir() else {}
    made = {row["method"]: row for row in content["rows"]}
    options = {row.method: row.options for row in experiment.rows}
    for row in old.get("rows", []):
        if row["method"] in made or row.get("options") != options.get(row["method"]):
            continue
        own = {key: old[key] for key in MADE if key in old and old[key] != content[key]}
        made[row["method"]] = own | row
    return [made[method] for method in options if method in made]


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds; ValueError where there are none, one is negative, or one is there twice."""
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"Invalid `seeds`: {list(seeds)}; expected different whole numbers, 0 or more.")
    return tuple(seeds)


def refuse_to_overwrite(experiment: Experiment, out: Path | None) -> None:
    """RunError where the figures of --quick would take the place of real ones, or lie among them."""
    if out is None:
        return
    clone = Path(__file__).parents[2] / "experiments" / "results"
    if out.resolve() == clone.resolve():
        raise RunError(f"--quick does not write to {out}, the folder of the real results; give another --out.")
    real = [name for name, content in read_results(out).items() if not content.get("quick")] if out.is_dir() else []
    if real:
        raise RunError(f"--quick does not write to {out}: {real[0]}.json there is a real result; give another --out.")


def describe_machine() -> dict[str, Any]:
    """What figures depend on beside the recipe."""
    machine = {
        "torch-bregman": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _state_folder(out: Path, name: str) -> Path:
    """OUT/.reproduce/NAME, which git does not see."""
    state = out / ".reproduce" / name
    _make_folder(state)
    ignored = out / ".reproduce" / ".gitignore"
    with writing(ignored):
        write_atomically(ignored, b"*\n")
    return state


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Could not make the folder {path}: {error.strerror or error}.") from None


def _train(
    experiment: Experiment, rows: Sequence[Row], seeds: Sequence[int], state: Path, data_root: Path | None,
    environment: dict[str, Any], say: Say, *, quick: bool = False, jobs: int = 1,
) -> list[dict[str, Any]]:  # fmt: skip
    """The result rows. Adds the numbers of threads and of runs at a time to `environment`."""
    runs: dict[str, list[Path]] = {}
    for row in rows:
        for seed in seeds:
            recipe = Recipe(**(row.options | (experiment.quick if quick else {}) | {"seed": seed})).check()
            if quick:
                recipe = replace(recipe, dataset=str(_cut_out(recipe, data_root, state)), limit=None)
            # A run is taken over only where all that its figures depend on is the same.
            key = json.dumps([asdict(recipe), environment, str(data_root)], sort_keys=True)
            slug = re.sub(r"\W+", "-", row.method).strip("-").lower()
            run = state / f"{slug}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
            run.mkdir(exist_ok=True)
            recipe.write(run / "recipe.toml")
            runs.setdefault(row.method, []).append(run)
    if jobs > 1:  # which says how to read the seconds
        environment["runs at a time"] = jobs
    done = sum(_ended(run) for group in runs.values() for run in group)
    if done:
        say(f"{done} runs that had ended before an interruption are taken over from {state}.")
    if quick:  # one process for all: starting it takes longer than such a run
        _run_in_process([run for group in runs.values() for run in group], data_root)
    started: list[subprocess.Popen[bytes]] = []
    results: list[dict[str, Any]] = []

    def report() -> None:
        """The rows in their order, as far as all their runs have ended."""
        for row in rows[len(results) :]:
            if not all(map(_ended, runs[row.method])):
                return
            parts = [json.loads((run / "result.json").read_text()) for run in runs[row.method]]
            environment["threads"] = sorted({*environment.get("threads", []), *(part["threads"] for part in parts)})
            results.append(summarise(row, experiment.source, parts))
            say(describe(results[-1]))

    report()
    with ThreadPoolExecutor(jobs) as pool:
        ends = {
            pool.submit(_run_in_process, [run], data_root, started): (row, run)
            for row in rows
            for run in runs[row.method]
            if not _ended(run)
        }
        try:
            for end in as_completed(ends):
                row, run = ends[end]
                try:
                    end.result()
                except RunError as error:
                    raise RunError(f"{experiment.name}, row {row.method!r}, {run.name}: {error}") from None
                report()
        except KeyboardInterrupt:
            raise Stopped(
                f"Stopped. Runs that have ended are kept in {state}, and what was running has saved its state: the "
                "same command goes on."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(end.done() for end in ends):  # after an error: the others save their state
                for process in started:
                    _let_stop(process)
                time.sleep(0.05)
    return results


def _cut_out(recipe: Recipe, data_root: Path | None, folder: Path) -> Path:
    """A file with the samples that --quick looks at: whole validation and test data would take most of its time."""
    path = folder / f"{Path(recipe.dataset).stem}-{recipe.limit}.npz"
    if not path.exists():
        data = load(recipe.dataset, data_root, limit=recipe.limit)
        splits = {"train": data.train, "val": data.validation, "test": data.test}
        # As pixels again: the file is normalised anew when it is read.
        arrays = {f"x_{kind}": data.raw(split.x[: QUICK["limit"]]).numpy() for kind, split in splits.items()}
        arrays |= {f"y_{kind}": split.y[: QUICK["limit"]].numpy() for kind, split in splits.items()}
        np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def _ended(run: Path) -> bool:
    return (run / "result.json").is_file()


def _run_in_process(
    runs: Sequence[Path], data_root: Path | None, started: list[subprocess.Popen[bytes]] | None = None
) -> None:
    """Train in the folders `runs`, which hold a recipe.toml each, in a fresh process, which is added to `started`.

    The process ends when its standard input does, so that it saves its state and stops also where this one is killed.
    It has a session of its own, so that Ctrl-C reaches it once and not twice.
    """
    root = "" if data_root is None else str(data_root.resolve())
    log = runs[0] / "log.txt"
    with (
        open(log, "wb") as stream,
        subprocess.Popen(
            [sys.executable, "-m", "torch_bregman.reproduce", root, *map(str, runs)],
            stdin=subprocess.PIPE, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        ) as process,
    ):  # fmt: skip
        if started is not None:
            started.append(process)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            _let_stop(process)
            process.wait()
            raise
    if code:
        lines = log.read_text(errors="replace").split("\n") if log.exists() else []
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise RunError(f"The run failed with exit code {code}: {said}")


def _let_stop(process: subprocess.Popen[bytes]) -> None:
    """End its standard input, on which it saves its state and ends."""
    assert process.stdin is not None
    process.stdin.close()


def _child(root: str, runs: Sequence[str]) -> None:
    """What runs in the process of its own."""

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


def peak_memory(recipe: Recipe) -> int | None:
    """`MEMORY` in bytes; None where the system does not say."""
    device = pick_device(recipe.device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summarise(row: Row, source: str, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The result row of `parts`, the results of one run per seed. std is that of the sample, 0 for a single seed."""
    ends = [part["end"] for part in parts]
    result: dict[str, Any] = {
        "method": row.method,
        "options": row.options,
        "asked": ends[0]["asked_density"],
        "kept": [end["density"] for end in ends],
        "weights": ends[0]["weights"],
    }
    for key in ("test_accuracy", "test_ssim", "test_loss", "val_accuracy", "val_ssim", "val_loss"):
        # There is no validation score of a run that never was on target.
        if all(key in end for end in ends) and not (key.endswith("loss") and "test_accuracy" in ends[0]):
            result |= _over_seeds(key, [end[key] for end in ends])
    for key in ("widths", "full_widths", "skips", "kept_linear", "kept_kernels", "lam"):
        if ends[0].get(key) is not None:
            result[key] = [end[key] for end in ends]
    result["seconds"] = [end["seconds"] for end in ends]
    result["dense_flops"] = [part["dense_flops"] for part in parts]
    result["flops"] = [end.get("flops", part["dense_flops"]) for end, part in zip(ends, parts, strict=True)]
    for key in ("sparse_flops", "fine_steps", "coarse_steps"):
        if key in ends[0]:
            result[key] = [end[key] for end in ends]
    result["peak_memory"] = [part["memory"] for part in parts]
    if ends[0].get("note"):
        result["note"] = ends[0]["note"]
    result["published"] = published(row, source)
    curves = [part["curve"] for part in parts]
    result["curve"] = {
        key: [round(statistics.mean(values), 5) for values in zip(*(curve[key] for curve in curves), strict=True)]
        for key in curves[0]
    }
    return result


def published(row: Row, source: str) -> dict[str, Any] | None:
    """What was published for `row`, None where nothing was."""
    if not row.published:
        return None
    told = row.published
    result = {"value": told.get("accuracy"), "density": told.get("density"), "source": told.get("source", source)}
    return result | {key: told[key] for key in ("ssim", "note") if key in told}


def _over_seeds(key: str, values: list[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {key: values, f"{key}_mean": statistics.mean(values), f"{key}_std": spread}


def narrow_resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A ResNet-18 with 8 filters in its first stage instead of 64: what --quick tries in place of the real one."""
    return ResNet(shape[0], classes, width=8)


# ---------------------------------------------------------------------- variance through depth


def variance_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `variances`, filled and checked."""
    settings: dict[str, Any] = {
        "nonlinearity": "relu", "correction": True, "density": 0.01, "depth": 20, "width": 1000, "samples": 256,
    } | options  # fmt: skip
    choose("nonlinearity", settings["nonlinearity"], ("relu", "tanh"))
    if type(settings["correction"]) is not bool:
        raise ValueError(f"Invalid `correction`: {settings['correction']!r}; expected true or false.")
    for name, low in (("depth", 2), ("width", 1), ("samples", 1)):
        if type(settings[name]) is not int or settings[name] < low:
            raise ValueError(f"Invalid `{name}`: {settings[name]!r}; expected a whole number of at least {low}.")
    return settings


def variances(options: dict[str, Any], seed: int) -> tuple[list[float], list[float], float]:
    """How the sparse start carries signals through `depth` Linear layers of `width` units without biases.

    Returns (E[z²] of the pre-activations z of each layer for standard normal inputs, E[(∂L/∂z)²] of each layer for a
    standard normal gradient at the output, density). With the correction the weights have variance α/r, else α.
    """
    settings = variance_settings(options)
    generator = torch.Generator().manual_seed(seed)
    width = settings["width"]
    layers = [nn.Linear(width, width, bias=False) for _ in range(settings["depth"])]
    model = nn.Sequential(*layers)
    sparse_init_(model, settings["density"], generator=generator, nonlinearity=settings["nonlinearity"])
    model.double()  # without the correction the squares soon leave the range of float32
    if not settings["correction"]:
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(math.sqrt(density_of(layer)))
    activation = torch.relu if settings["nonlinearity"] == "relu" else torch.tanh
    x = torch.randn(settings["samples"], width, generator=generator).double()
    outputs = []
    for layer in layers:
        z = layer(x)
        z.retain_grad()
        outputs.append(z)
        x = activation(z)
    outputs[-1].backward(torch.randn(z.shape, generator=generator).double())
    gradients = [z.grad.square().mean().item() for z in outputs if z.grad is not None]
    return [z.square().mean().item() for z in outputs], gradients, density_of(model)


def variance_row(row: Row, quick: dict[str, Any], seeds: Sequence[int], say: Say) -> dict[str, Any]:
    """The result row of `variances`; the factors are per layer, geometric means over the depth."""
    options = row.options | quick
    found = [variances(options, seed) for seed in seeds]

    def factor(first: float, last: float) -> float:
        return (last / first) ** (1 / (len(found[0][0]) - 1))

    result: dict[str, Any] = {
        "method": row.method, "options": row.options, "asked": variance_settings(options)["density"],
        "kept": [density for _, _, density in found],
    }  # fmt: skip
    result |= _over_seeds("activation_factor", [factor(z[0], z[-1]) for z, _, _ in found])
    result |= _over_seeds("gradient_factor", [factor(g[-1], g[0]) for _, g, _ in found])
    for i, name in enumerate(("activations", "gradients")):
        result[name] = [statistics.geometric_mean(values) for values in zip(*(part[i] for part in found), strict=True)]
    say(describe(result))
    return result


# ---------------------------------------------------------------------- words and tables


def spread(row: dict[str, Any], key: str, scale: float = 100.0, unit: str = " %") -> str:
    """ "97.90 ± 0.12 %", without the ± for a single seed, or "" where it was not measured."""
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, int | float) for value in values):
        return ""
    made = _over_seeds(key, [float(value) for value in values])
    text = f"{scale * made[f'{key}_mean']:.{2 if scale == 100 else 4}f}"
    return text + (f" ± {scale * made[f'{key}_std']:.{2 if scale == 100 else 4}f}" if len(values) > 1 else "") + unit


def kept(row: dict[str, Any]) -> str:
    """The share kept of each seed, equal ones once."""
    return ", ".join(dict.fromkeys(percent(share) for share in row.get("kept", [])))


def kept_kinds(row: dict[str, Any]) -> str:
    """With groups of kernels, the shares of the Linear weights and of the kernels, means over the seeds."""
    shares = [row.get(key) or [None] for key in ("kept_linear", "kept_kernels")]
    if row.get("options", {}).get("groups") != "kernels" or any(None in share for share in shares):
        return ""
    return " / ".join(percent(statistics.mean(share)) for share in shares)


def claim(told: dict[str, Any] | None) -> str:
    """What was published: "97.90 % at 10.00 %", "SSIM 0.93"."""
    told = told or {}
    parts = [percent(told["value"])] if told.get("value") is not None else []
    parts += [f"SSIM {told['ssim']:g}"] if told.get("ssim") is not None else []
    parts += [f"at {percent(told['density'])}"] if told.get("density") is not None else []
    return " ".join(parts)


def work(row: dict[str, Any], key: str = "flops") -> str:
    """Training FLOPs, and beside dense steps."""
    if not row.get(key) or not row.get("dense_flops"):
        return ""
    done, dense = statistics.mean(row[key]), statistics.mean(row["dense_flops"])
    return f"{done:.2e} ({done / dense:.0%})"


def memory(row: dict[str, Any]) -> str:
    """The largest of the peaks."""
    peaks = [peak for peak in row.get("peak_memory", []) if peak]
    return f"{max(peaks) / 2**20:.0f} MiB" if peaks else ""


def fine_steps(row: dict[str, Any]) -> str:
    """The share of the steps with the gradient of all weights."""
    if "fine_share" in row:
        return f"{max(row['fine_share']):.1%}"
    if "fine_steps" not in row or "coarse_steps" not in row or not isinstance(row["fine_steps"], list):
        return ""
    return f"{max(f / (f + c) for f, c in zip(row['fine_steps'], row['coarse_steps'], strict=True)):.1%}"


def widths(row: dict[str, Any]) -> str:
    """The outputs alive per layer, mean over the seeds, where some are not: "296-170-73-107-120-488"."""
    if "widths" not in row or row["widths"] == row["full_widths"]:
        return ""
    return "-".join(f"{statistics.mean(layer):.0f}" for layer in zip(*row["widths"], strict=True))


def surviving_skips(row: dict[str, Any]) -> str:
    """The skips that are not zero, mean over the seeds, of those that there are."""
    if "skips" not in row:
        return ""
    alive = [sum(s != 0 for chain in seed for line in chain["skips"] for s in line) for seed in row["skips"]]
    sizes = [len(chain["skips"]) for chain in row["skips"][0]]
    return f"{statistics.mean(alive):.3g} of {sum(size * (size + 1) // 2 for size in sizes)}"


#: header → cell of a result row; a table has the columns in which there is something
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "method": lambda row: next((str(row[key]) for key in LABELS if key in row), "?"),
    "asked": lambda row: percent(row["asked"]) if row.get("asked") else "",
    "kept": kept,
    "Linear / kernels kept": kept_kinds,
    "test accuracy": lambda row: spread(row, "test_accuracy"),
    "SSIM": lambda row: spread(row, "test_ssim", 1, ""),
    "test loss": lambda row: spread(row, "test_loss", 1, ""),
    "validation": lambda row: spread(row, "val_accuracy"),
    "validation SSIM": lambda row: spread(row, "val_ssim", 1, ""),
    "published": lambda row: claim(row.get("published")),
    "activations, × per layer": lambda row: spread(row, "activation_factor", 1, ""),
    "gradients, × per layer": lambda row: spread(row, "gradient_factor", 1, ""),
    "alive per layer": widths,
    "skips alive": surviving_skips,
    "fine steps": fine_steps,
    "FLOPs (of dense)": work,
    "if zeros were free": lambda row: work(row, "sparse_flops"),
    "seconds": lambda row: f"{statistics.mean(row['seconds']):.0f}" if row.get("seconds") else "",
    "peak memory": memory,
    "": lambda row: row.get("state", ""),
}


def describe(row: dict[str, Any]) -> str:
    """A result row as one line of the terminal."""
    cells = {name: cell(row) for name, cell in COLUMNS.items()}
    if row.get("weights") and cells["kept"]:
        cells["kept"] += f" of {row['weights']:,} weights"
    told = (row.get("published") or {}).get("note", "")
    if cells["published"] and told:
        cells["published"] += f" ({told})"
    label = cells.pop("method")
    cells[""] = row.get("note", cells[""])
    return f"  {label}: " + "; ".join(f"{name} {text}".strip() for name, text in cells.items() if text)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Result rows in Markdown."""
    return markdown(list(COLUMNS), [{name: cell(row) for name, cell in COLUMNS.items()} for row in rows])


def markdown(names: Sequence[str], rows: Sequence[dict[str, str]]) -> str:
    """A table of the columns `names` in which there is something."""
    used = [name for name in names if any(row.get(name) for row in rows)]
    cells = [[row.get(name, "").replace("|", r"\|") or "—" * (name != "") for name in used] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [used, ["---"] * len(used), *cells])


def comparison(rows: Iterable[dict[str, Any]]) -> str:
    """Ours beside the rivals at equal density and epochs, in Markdown; empty where there is no such cell.

    Of several rows of ours in a cell the one with the best validation accuracy counts. std is √((s₁² + s₂²)/2) of it
    and of the best rival.
    """
    cells: dict[tuple[float, int | None], list[dict[str, Any]]] = {}
    for row in rows:
        options = row.get("options", {})
        if row.get("asked") and "test_accuracy_mean" in row and "conv_density" not in options:
            cells.setdefault((row["asked"], options.get("epochs")), []).append(row)
    names, lines = ["kept", "epochs", "ours"], []
    for (asked, epochs), there in sorted(cells.items(), key=lambda cell: (-cell[0][0], cell[0][1] or 0)):
        rivals = [row for row in there if row["options"].get("optimizer") in (*RIVALS, "proxsgd")]
        ours = [row for row in there if row not in rivals and "val_accuracy_mean" in row]
        if not rivals or not ours:
            continue
        mine = max(ours, key=lambda row: float(row["val_accuracy_mean"]))
        best = max(rivals, key=lambda row: float(row["test_accuracy_mean"]))
        gap = mine["test_accuracy_mean"] - best["test_accuracy_mean"]
        std = math.sqrt((mine["test_accuracy_std"] ** 2 + best["test_accuracy_std"] ** 2) / 2)
        near_best = "within a std of the best" if gap >= -std else f"{-100 * gap:.2f} points short"
        line = {"kept": percent(asked), "epochs": str(epochs or ""), "ours is": "best" if gap >= 0 else near_best}
        line["ours"] = f"{mine['method']}: {spread(mine, 'test_accuracy')}"
        line |= {family(row["method"]): spread(row, "test_accuracy") for row in rivals}
        names += [name for name in map(family, (row["method"] for row in rivals)) if name not in names]
        lines.append(line)
    return markdown([*names, "ours is"], lines) if lines else ""


def headline(experiment: Experiment) -> Row | None:
    """The sparse row with the best published score, which stands for the table."""

    def score(row: Row) -> float:
        return row.published.get("accuracy", row.published.get("ssim", -1.0))

    there = [row for row in experiment.rows if score(row) >= 0 and row.published.get("density", 1) < 1]
    return max(there, key=score, default=None)


def overview(experiments: dict[str, Experiment], results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of (name, task, published, ours) for the list of what can be reproduced."""
    lines = []
    for name, experiment in experiments.items():
        row, mine, told = headline(experiment), None, "—"
        if row is not None:
            told = f"{row.method}: {claim(published(row, experiment.source))}"
            mine = next((r for r in results.get(name, {}).get("rows", []) if r.get("method") == row.method), None)
        ours = (
            f"{spread(mine, 'test_accuracy') or 'SSIM ' + spread(mine, 'test_ssim', 1, '')} at {kept(mine)}"
            if mine
            else ""
        )
        if not ours:
            ours = "see docs/results.md" if name in results else "not yet run"
        lines.append([name, experiment.task, told, ours])
    return lines


def results_page(
    experiments: dict[str, Experiment], results: dict[str, dict[str, Any]], figures: Path | None = None
) -> str:
    """docs/results.md: a section per recipe, run or not, then one per other result file; and the PNGs in `figures`."""
    lines = [
        "# Results",
        "Written by `torch-bregman reproduce`; changes by hand are lost. Mean ± standard deviation of the sample over "
        "the seeds. *Kept*: non-zero entries of all Linear and Conv weights over their number, biases and norms not "
        "counted. A network is chosen on validation data, and the test data are read once, at the end of a run.",
        f"*FLOPs* {FLOPS} *If zeros were free*: {SPARSE_FLOPS} *Peak memory*: {MEMORY} *Seconds*: wall time of a run, "
        "mean over the seeds; other work ran on the machine, so they are rough.",
    ]
    if any(content.get("quick") for content in results.values()):
        lines.append(f"**{QUICK_WARNING}**")
    for name, experiment in experiments.items():
        content = results.get(name, {})
        lines += [f"## {name}", f"{experiment.title}. {experiment.task}. Published: {experiment.source}."]
        lines += _notes(content)
        done = content.get("rows", [])
        labels = {row.get("method") for row in done}
        todo = [
            {"method": row.method, "state": "not yet run",
             "asked": None if "conv_density" in row.options else row.options.get("density"),
             "published": published(row, experiment.source)}
            for row in experiment.rows if row.method not in labels
        ]  # fmt: skip
        lines.append(table([*done, *todo]))
        lines += _other_notes(done)
        if beside := comparison(done):
            lines += [
                "At equal density and epochs, test accuracy; of ours the row that is best on validation data; "
                "*a std* is that of both, √((s₁² + s₂²)/2):",
                beside,
            ]
        lines += dict.fromkeys(row["note"] for row in done if row.get("note"))  # on the data
        notes = [f"* {row.method}: {row.published['note']}" for row in experiment.rows if row.published.get("note")]
        if notes:
            lines.append("\n".join(notes))
        if figures is not None and (figures / f"results-{name}.png").is_file():
            lines.append(f"![{experiment.title}](results-{name}.png)")
        devices = sorted({row.options.get("device", "auto") for row in experiment.rows} - {"auto", "cpu"})
        if devices and not content:
            lines.append(f"Not yet run: it needs a device {', '.join(devices)}.")
    for name, content in results.items():
        if name not in experiments:
            recipe = content.get("recipe", {})
            lines += [f"## {name}", ", ".join(f"{key}: {value}" for key, value in recipe.items()) + "."]
            lines += [*_notes(content), table(content["rows"])]
    return "\n\n".join(lines) + "\n"


def _notes(content: dict[str, Any]) -> list[str]:
    """How a result file came about, as far as it says."""
    parts = ["**--quick: means nothing.**"] if content.get("quick") else []
    parts += [f"`{content['command']}`"] if content.get("command") else []
    if content.get("seeds"):
        parts.append(f"seeds {' '.join(map(str, content['seeds']))}")
    environment = dict(content.get("environment", {}))
    threads = environment.pop("threads", None)
    parts += [f"{key} {value}" if key != "machine" else str(value) for key, value in environment.items()]
    parts += [f"threads {', '.join(map(str, threads))}"] if threads else []
    return ["; ".join(parts)] if parts else []


def _other_notes(rows: Iterable[dict[str, Any]]) -> list[str]:
    """How the rows came about that were made in another way than the rest of their table."""
    ways: dict[str, list[str]] = {}
    for row in rows:
        if any(key in row for key in MADE):
            ways.setdefault("; ".join(_notes(row)), []).append(row["method"])
    return ["\n".join(f"* {'; '.join(methods)}: {way}" for way, methods in ways.items())] if ways else []


def write_page(folder: Path, experiments: dict[str, Experiment], results_folder: Path, *, plots: bool = False) -> Path:
    """Write results.md in `folder` from the result files, with `plots` its PNGs first; returns its path."""
    results = read_results(results_folder) if results_folder.is_dir() else {}
    _make_folder(folder)
    if plots:
        for name, experiment in experiments.items():
            if name in results:
                plot(results[name], folder / f"results-{name}.png", experiment.picture)
    path = folder / "results.md"
    with writing(path):
        write_atomically(path, results_page(experiments, results, folder).encode())
    return path


def page_folder(recipes: Path, out: Path) -> Path:
    """Where results.md belongs: docs/ of the clone for its own results, else beside the result files."""
    recipes, out = recipes.resolve(), out.resolve()
    docs = recipes.parent.parent / "docs"
    return docs if out == recipes.parent / "results" and docs.is_dir() else out


def plot(content: dict[str, Any], path: Path, picture: str = "curves") -> None:
    """A PNG: accuracy and density over the epochs or the variances over the layers, or the architectures found."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError("--plots needs the extra train: pip install 'torch-bregman[train]'.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        draw = draw_architectures if picture == "architecture" else draw_curves
        if draw(figure, content["rows"]):
            with writing(path):
                write_atomically(path, lambda file: figure.savefig(file, format="png", metadata={"Software": None}))


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2:])
