"""Result rows as text: a line of the terminal, a row of a Markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch_bregman.report.words import percent

from .results import over_seeds

LABELS = ("method", "move", "rule")  # what the rows of result files are called by


def spread(row: dict[str, Any], key: str, scale: float = 100.0, unit: str = " %") -> str:
    """ "97.90 ± 0.12 %", without the ± for a single seed, or "" where it was not measured."""
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, int | float) for value in values):
        return ""
    made = over_seeds(key, [float(value) for value in values])
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
