"""The architecture that a run has found: what is alive of each layer's width, and which skips survived."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from torch_bregman.report.plots import DENSE, GRID, INK, MUTED, SPARSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 0.34  # of the distance between two layers


def draw_architectures(figure: Figure, rows: list[dict[str, Any]]) -> bool:
    """A panel per row of results in which a layer is not as wide as it could be; False where there is none.

    A row holds per seed `widths`, the outputs alive of each layer, `full_widths`, all of them, and where the network
    has skips `skips`, those of `models.skip.skips`.
    """
    shown = [row for row in rows if "widths" in row and row["widths"] != row["full_widths"]]
    if not shown:
        return False
    columns = min(2, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure.set_size_inches(5 * columns, 3.4 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, row in zip(panels, shown, strict=False):
        _draw(axes, row)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    told = "outputs alive of each layer, mean and range over the seeds; grey: all"
    if any("skips" in row for row in shown):
        told += "; arcs: skips that survived, pale where in few seeds"
    figure.supxlabel(told, fontsize=8, color=MUTED)
    return True


def _draw(axes: Axes, row: dict[str, Any]) -> None:
    """Layers from left to right as bars round the axis, alive in front of all; skips as arcs above them."""
    full = row["full_widths"][0]
    places = range(1, len(full) + 1)
    layers = list(zip(*row["widths"], strict=True))
    alive = [statistics.mean(layer) for layer in layers]
    top = max(full) / 2
    axes.bar(places, full, 2 * BAR, bottom=[-width / 2 for width in full], color=GRID)
    axes.bar(places, alive, 2 * BAR, bottom=[-width / 2 for width in alive], color=SPARSE)
    for (left, a), (right, b) in pairwise(zip(places, alive, strict=True)):
        axes.fill_between([left + BAR, right - BAR], [-a / 2, -b / 2], [a / 2, b / 2], color=SPARSE, alpha=0.25, lw=0)
    for place, mean, layer in zip(places, alive, layers, strict=True):
        # The seeds apart where they differ.
        spread = f"\n{min(layer)}–{max(layer)}" if min(layer) < max(layer) else ""
        axes.text(place, -top * 1.08, f"{mean:.0f}{spread}", ha="center", va="top", fontsize=7, color=INK)
    highest = top
    for start, end, strength, share in _survivors(row):
        height = top * (1.1 + 0.28 * (end - start))
        highest = max(highest, height)
        across = [start + (end - start) * t / 40 for t in range(41)]
        up = [top * 1.05 + (height - top * 1.05) * math.sin(math.pi * t / 40) for t in range(41)]
        axes.plot(across, up, color=SPARSE if strength > 0 else DENSE, lw=1.6, alpha=0.25 + 0.75 * share)
        axes.text((start + end) / 2, height, f"{strength:+.2g}", ha="center", va="bottom", fontsize=6, color=MUTED)
    axes.set_title(row["method"], fontsize=9, color=INK)
    axes.set_xticks([0, *places], ["in", *map(str, places)], fontsize=7)
    axes.set_xlim(-0.4, len(full) + 0.6)
    axes.set_ylim(-top * 1.45, highest + 0.2 * top)
    axes.set_yticks([])
    axes.set_xlabel("layer", fontsize=8)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _survivors(row: dict[str, Any]) -> list[tuple[int, int, float, float]]:
    """(from layer, to layer, mean s where it survived, share of the seeds in which it did) of each skip."""
    found = []
    seeds = row.get("skips", [])
    for k, chain in enumerate(seeds[0] if seeds else []):
        first = chain["before"]
        for line in range(len(chain["skips"])):
            for i in range(line + 1):
                values = [seed[k]["skips"][line][i] for seed in seeds]
                if living := [value for value in values if value]:
                    share = len(living) / len(values)
                    found.append((first + i, first + line + 1, statistics.mean(living), share))
    return found
