"""Running the rows of a recipe over the seeds, several at a time, and going on after an interruption.

Every run trains in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from torch_bregman.data import load
from torch_bregman.files import write_atomically
from torch_bregman.train.errors import RunError, Stopped, writing
from torch_bregman.train.recipe import Recipe

from .cells import describe
from .machine import describe_machine
from .recipes import EXPERIMENTS, QUICK, QUICK_WARNING, Experiment, Row, find_recipes
from .results import make_folder, merged, over_seeds, read_results, summarise
from .variance import variance_settings, variances

Say = Callable[[str], None]
#: `child.main` of this clone, whatever is called reproduce in the folder that the command was started from
CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from reproduce.child import main; main(*sys.argv[2:])"


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
        make_folder(out)
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


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds; ValueError where there are none, one is negative, or one is there twice."""
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise ValueError(f"Invalid `seeds`: {list(seeds)}; expected different whole numbers, 0 or more.")
    return tuple(seeds)


def refuse_to_overwrite(experiment: Experiment, out: Path | None) -> None:
    """RunError where the figures of --quick would take the place of real ones, or lie among them."""
    if out is None:
        return
    if out.resolve() == (find_recipes(None).parent / "results").resolve():
        raise RunError(f"--quick does not write to {out}, the folder of the real results; give another --out.")
    real = [name for name, content in read_results(out).items() if not content.get("quick")] if out.is_dir() else []
    if real:
        raise RunError(f"--quick does not write to {out}: {real[0]}.json there is a real result; give another --out.")


def _state_folder(out: Path, name: str) -> Path:
    """OUT/.reproduce/NAME, which git does not see."""
    state = out / ".reproduce" / name
    make_folder(state)
    ignored = out / ".reproduce" / ".gitignore"
    with writing(ignored):
        write_atomically(ignored, b"*\n")
    return state


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
        run_in_process([run for group in runs.values() for run in group], data_root)
    started: list[subprocess.Popen[bytes]] = []
    results: list[dict[str, Any]] = []
    over = {run for group in runs.values() for run in group if _ended(run)}  # one that runs may be writing its result

    def report() -> None:
        """The rows in their order, as far as all their runs have ended."""
        for row in rows[len(results) :]:
            if not over.issuperset(runs[row.method]):
                return
            parts = [json.loads((run / "result.json").read_text()) for run in runs[row.method]]
            environment["threads"] = sorted({*environment.get("threads", []), *(part["threads"] for part in parts)})
            results.append(summarise(row, experiment.source, parts))
            say(describe(results[-1]))

    report()
    with ThreadPoolExecutor(jobs) as pool:
        ends = {
            pool.submit(run_in_process, [run], data_root, started): (row, run)
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
                over.add(run)
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


def run_in_process(
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
            [sys.executable, "-c", CHILD, str(EXPERIMENTS), root, *map(str, runs)],
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
    result |= over_seeds("activation_factor", [factor(z[0], z[-1]) for z, _, _ in found])
    result |= over_seeds("gradient_factor", [factor(g[-1], g[0]) for _, g, _ in found])
    for i, name in enumerate(("activations", "gradients")):
        result[name] = [statistics.geometric_mean(values) for values in zip(*(part[i] for part in found), strict=True)]
    say(describe(result))
    return result
