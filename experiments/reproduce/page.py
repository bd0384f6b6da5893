"""docs/results.md and its pictures, made of the recipe files and the result files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch_bregman.files import write_atomically
from torch_bregman.report.words import percent
from torch_bregman.train.errors import RunError, writing
from torch_bregman.train.recipe import RIVALS

from .architecture import draw_architectures
from .cells import claim, kept, markdown, spread, table
from .curves import draw_curves, family
from .recipes import QUICK_WARNING, Experiment, Row
from .results import MADE, make_folder, published, read_results

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
    make_folder(folder)
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
