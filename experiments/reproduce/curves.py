"""The figure of a table of results: accuracy over what is kept, and how training went."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def family(method: str) -> str:
    """The label of a row without its density: "RigL 2 %" and "RigL 5 %" are one method."""
    return re.sub(r"\s*[\d.]+(\s*/\s*[\d.]+)? %", "", method)


def draw_curves(figure: Figure, rows: list[dict[str, Any]]) -> bool:
    """Accuracy over what is kept and panels over the epochs, or over the layers; False where there is nothing to show.

    A method has one colour; its densities are solid, dashed and dotted lines, in the order of the table.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    over_layers = any("activations" in row for row in rows)
    if over_layers:
        names = [("activations", "E[z²] of the layer", 1.0), ("gradients", "E[(∂L/∂z)²] of the layer", 1.0)]
        curves = {key: [(i, row[key]) for i, row in enumerate(rows) if row.get(key)] for key, _, _ in names}
    else:
        names = [("val_accuracy", "validation accuracy, %", 100.0), ("density", "weights kept, %", 100.0),
                 ("l1_norm", "‖θ‖₁", 1.0)]  # fmt: skip
        curves = {
            key: [(i, row["curve"][key]) for i, row in enumerate(rows) if key in row.get("curve", {})]
            for key, _, _ in names
        }
    panels = [name for name in names if curves[name[0]]]
    scored = [(i, row) for i, row in enumerate(rows) if "test_accuracy_mean" in row]
    if not panels:
        return False

    methods = list(dict.fromkeys(family(row["method"]) for row in rows))
    colours = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    colour = {method: colours[i % len(colours)] for i, method in enumerate(methods)}
    members = {method: [i for i, row in enumerate(rows) if family(row["method"]) == method] for method in methods}

    def look(i: int) -> dict[str, Any]:
        method = family(rows[i]["method"])
        return {"color": colour[method], "ls": ("-", "--", ":", "-.")[members[method].index(i) % 4]}

    count = len(panels) + bool(scored)
    down = 2 if count > 3 else 1
    across = math.ceil(count / down)
    figure.set_figheight(max(3.6 * down + 0.6, 0.4 + 0.15 * len(methods)))
    places = iter(figure.subplots(down, across, squeeze=False).flat)
    if scored:
        axes = next(places)
        for method in methods:
            points = sorted(
                (100 * statistics.mean(row["kept"]), 100 * row["test_accuracy_mean"], 100 * row["test_accuracy_std"])
                for i, row in scored if i in members[method]
            )  # fmt: skip
            if points:
                x, y, error = zip(*points, strict=True)
                axes.errorbar(x, y, error, color=colour[method], marker="o", ms=4, lw=1.1, capsize=2)
        axes.set_xlabel("weights kept, %")
        axes.set_ylabel("test accuracy, %")
        _plain_log(axes.set_xscale, axes.xaxis)
        shares = [100 * statistics.mean(row["kept"]) for _, row in scored]
        axes.set_xlim(min(shares) / 1.6, max(shares) * 1.6)  # all may have kept the same
        _cut_below(
            axes,
            [
                (family(row["method"]), 100 * row["test_accuracy_mean"], 100 * row["test_accuracy_std"])
                for _, row in scored
            ],
        )
    for axes, (key, title, scale) in zip(places, panels, strict=False):
        for i, values in curves[key]:
            axes.plot(range(over_layers, over_layers + len(values)), [scale * v for v in values], lw=1.3, **look(i))
        axes.set_xlabel("layer" if over_layers else "epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(title)
        if key == "val_accuracy":
            _cut_below(axes, [(family(rows[i]["method"]), scale * values[-1], 0.0) for i, values in curves[key]])
        elif over_layers:
            axes.set_yscale("log")
        else:
            _plain_log(axes.set_yscale, axes.yaxis)
    for axes in figure.axes:
        axes.grid(color="#e2e6ea")
        if not axes.has_data():
            axes.set_axis_off()
    handles = [Line2D([], [], color=colour[method], lw=2) for method in methods]
    figure.legend(handles, methods, loc="outside right upper", fontsize=7.5)
    return True


def _plain_log(set_scale: Callable[[str], None], axis: Any) -> None:
    """Logarithmic, with labels as one writes them: 0.5, 2, 100."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _cut_below(axes: Any, last: list[tuple[str, float, float]]) -> None:
    """Limits of the (method, accuracy, std) in %: those far below would press the others together.

    All start at chance. The best of each method is always to be seen.
    """
    values = [value for _, value, _ in last]
    best = {method: value for method, value, _ in sorted(last, key=lambda entry: entry[1])}
    high, low = max(values), min(max(min(values), max(values) - 5.0), *best.values())
    axes.set_ylim(max(0.0, low - max(1.0, 0.3 * (high - low))), max(value + std for _, value, std in last) + 0.5)
