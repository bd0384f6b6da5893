"""Result rows and files: what the runs of a row come to, and what is in the files already."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_bregman.models import MOVED
from torch_bregman.train.errors import RunError

from .recipes import Experiment, Row

MADE = ("seeds", "command", "environment")  # how a row was made


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


def merged(experiment: Experiment, out: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of `content` among those that OUT/NAME.json has already, in the order of the recipe.

    A row that was made in another way than `content` says keeps its seeds, command and environment. One whose options
    are no longer those of the recipe is left out.
    """
    old = read_results(out).get(experiment.name, {}) if out.is_dir() else {}
    made = {row["method"]: row for row in content["rows"]}
    options = {row.method: row.options for row in experiment.rows}
    for row in old.get("rows", []):
        if row["method"] in made or named_now(row.get("options")) != options.get(row["method"]):
            continue
        own = {key: old[key] for key in MADE if key in old and old[key] != content[key]}
        made[row["method"]] = own | row
    return [made[method] for method in options if method in made]


def named_now(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """The options in a result file, with a model that has moved since under its present name."""
    model = (options or {}).get("model")
    return options | {"model": MOVED[model]} if options and model in MOVED else options


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
            result |= over_seeds(key, [end[key] for end in ends])
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


def over_seeds(key: str, values: list[float]) -> dict[str, Any]:
    """The values of a measure, their mean and std: that of the sample, 0 for a single seed."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {key: values, f"{key}_mean": statistics.mean(values), f"{key}_std": spread}


def make_folder(path: Path) -> None:
    """Make the folder of result files; RunError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"Could not make the folder {path}: {error.strerror or error}.") from None
