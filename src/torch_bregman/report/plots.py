"""The figures of the report as SVG text. Each returns None where the run has not measured what it shows.

All share their width, their margins and their epoch axis, so that they align on the page; lines carry their names at
their right end in place of a legend. Colours are those of `COLOURS`, each written into the SVG as a CSS variable of the
page, which is how one SVG serves light and dark. Draw them inside `style()`.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from torch_bregman.density import LayerSparsity
from torch_bregman.extras import needs_extra
from torch_bregman.proof import Units
from torch_bregman.report.records import Record, series
from torch_bregman.report.words import clean, number, percent, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MAX_LAYERS", "accuracy", "densities", "density", "lam", "layers", "loss", "seconds", "shown_layers",
           "style", "units", "work"]  # fmt: skip

# Blue and vermilion of Okabe & Ito: told apart with every common kind of colour blindness, and in grey.
SPARSE, DENSE, INK, MUTED, GRID, CARD = "#0072b2", "#d55e00", "#1c2430", "#66707c", "#e2e6ea", "#fefefe"
COLOURS = {"sparse": SPARSE, "dense": DENSE, "ink": INK, "muted": MUTED, "grid": GRID, "card": CARD}

WIDTH, HEIGHT = 520.0, 270.0  # points; a card of the page is about as many pixels wide
LEFT, RIGHT, TOP, BOTTOM = 50.0, 126.0, 18.0, 34.0  # margins; the right one holds the names of the lines
ONE_COLUMN = 10  # layers in one figure; more are drawn in two
MAX_LAYERS = 40  # more rows than this are no picture; the table of the page has them all

Label = tuple[float, str, str]  # y in data units, text, colour
Bar = tuple[str, float, float, str]  # name, what there was, what is alive, text


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's own defaults, text kept as text, and the user's settings back at the end."""
    with needs_extra("train"):
        import matplotlib
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a matplotlibrc with LaTeX or a dark ground is not meant for this page
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "torch-bregman"})
        warnings.filterwarnings("ignore", "Glyph")  # a layer may be named in a script that the measuring font lacks
        yield


def accuracy(record: Record) -> str | None:
    """Validation accuracy over the epochs: sparse run, dense twin, a dot wherever the density was on target."""
    x, y = series(record.epochs, "val_accuracy")
    if len(x) < 2:
        return None
    figure, axes = _figure(record)
    labels: list[Label] = [(y[-1], f"sparse {percent(y[-1])}", SPARSE)]
    seen = y[len(y) // 6 :]  # the first epochs rise from chance; scaled to them, the rest would be one flat line
    if record.twin is not None and (twin := series(record.twin.epochs, "val_accuracy"))[0]:
        axes.plot(*twin, color=DENSE, lw=1.4)
        labels.append((twin[1][-1], f"dense {percent(twin[1][-1])}", DENSE))
        seen += twin[1][len(twin[1]) // 6 :]
    axes.plot(x, y, color=SPARSE, lw=2)
    dots = series([row for row in record.epochs if record.on_target(row)], "val_accuracy")
    axes.plot(*dots, "o", color=SPARSE, mec=CARD, mew=1, ms=6, zorder=3)
    best = number((record.end or {}).get("best_epoch"))
    if best is not None and best in x:
        axes.plot([best], [y[x.index(best)]], "o", color=CARD, mec=SPARSE, mew=2, ms=8, zorder=4)
    pad = 0.12 * max(max(seen) - min(seen), 0.005)
    axes.set_ylim(max(min(seen) - pad, 0.0), min(max(seen + y) + pad, 1.0 + pad / 4))
    _percent_axis(axes)
    return _finish(figure, axes, "accuracy", record, labels)


def loss(record: Record) -> str | None:
    """Training and validation loss over the epochs, and the twin's validation loss."""
    train, val = series(record.epochs, "train_loss"), series(record.epochs, "val_loss")
    if len(train[0]) < 2 and len(val[0]) < 2:
        return None
    figure, axes = _figure(record)
    labels: list[Label] = []
    lines = [(train, "training", SPARSE, 1.2, "--"), (val, "validation", SPARSE, 2.0, "-")]
    if record.twin is not None:
        lines.append((series(record.twin.epochs, "val_loss"), "dense val.", DENSE, 1.4, "-"))
    for (x, y), name, colour, width, style in lines:
        if x:
            axes.plot(x, y, color=colour, lw=width, ls=style)
            labels.append((y[-1], f"{name} {y[-1]:.3g}", colour))
    values = [value for (_, y), *_ in lines for value in y]
    if min(values) > 0 and max(values) > 8 * min(values):
        _log_axis(axes, values, lambda v: f"{v:g}")
    return _finish(figure, axes, "loss", record, labels)


def density(record: Record) -> str | None:
    """Share of non-zero weights over the epochs on a logarithmic axis, with the density that was asked for."""
    x, y = _positive(series(record.epochs, "density"))
    if len(x) < 2:
        return None
    figure, axes = _figure(record)
    labels: list[Label] = [(y[-1], percent(y[-1]), SPARSE)]
    asked = record.asked
    if asked is not None and asked > 0:
        axes.axhline(asked, color=INK, lw=1, ls=(0, (4, 3)))
        labels.append((asked, f"asked {percent(asked)}", INK))
    axes.plot(x, y, color=SPARSE, lw=2)
    _log_axis(axes, y + ([asked] if asked is not None and asked > 0 else []), lambda v: f"{100 * v:g} %")
    return _finish(figure, axes, "density", record, labels)


def lam(record: Record) -> str | None:
    """The strength λ of the regularizer over the epochs, on a logarithmic axis."""
    x, y = _positive(series(record.epochs, "lam"))
    if len(x) < 2:
        return None
    figure, axes = _figure(record)
    axes.plot(x, y, color=SPARSE, lw=2)
    _log_axis(axes, y, lambda v: f"{v:g}")
    return _finish(figure, axes, "lam", record, [(y[-1], f"λ = {short(y[-1])}", SPARSE)])


def seconds(record: Record) -> str | None:
    """Seconds of each epoch from zero: sparse run and dense twin."""
    x, y = _positive(series(record.epochs, "seconds"))
    if len(x) < 2:
        return None
    figure, axes = _figure(record)
    labels: list[Label] = [(y[-1], f"sparse {short(y[-1])} s", SPARSE)]
    top = max(y)
    if record.twin is not None and (twin := _positive(series(record.twin.epochs, "seconds")))[0]:
        axes.plot(*twin, color=DENSE, lw=1.4)
        labels.append((twin[1][-1], f"dense {short(twin[1][-1])} s", DENSE))
        top = max(top, *twin[1])
    axes.plot(x, y, color=SPARSE, lw=2)
    axes.set_ylim(0, 1.08 * top)
    _linear_axis(axes, lambda v: f"{v:.6g} s")
    return _finish(figure, axes, "seconds", record, labels)


def work(record: Record) -> str | None:
    """FLOPs of each epoch of a multilevel run as a share of those of dense steps, from zero."""
    x, y = record.work
    if len(x) < 2:
        return None
    figure, axes = _figure(record)
    axes.axhline(1, color=DENSE, lw=1.4)
    axes.plot(x, y, color=SPARSE, lw=2)
    axes.set_ylim(0, 1.08 * max(*y, 1.0))
    _percent_axis(axes)
    labels: list[Label] = [(y[-1], f"sparse {percent(y[-1])}", SPARSE), (1.0, "dense 100 %", DENSE)]
    return _finish(figure, axes, "work", record, labels)


def layers(record: Record) -> list[str]:
    """Density of every layer over the epochs, one row per layer, each row from zero to the layer's own maximum.

    One figure, or two to stand side by side where the rows of one would be flat; none if nothing was measured.
    """
    curves = [(name, *series(record.epochs, name, inside="layers")) for name in shown_layers(record)]
    curves = [curve for curve in curves if len(curve[1]) >= 2]
    if len(curves) <= ONE_COLUMN:
        return [_rows(record, curves, "layers")] if curves else []
    half = (len(curves) + 1) // 2
    return [_rows(record, curves[:half], "layers"), _rows(record, curves[half:], "layers-more")]


def _rows(record: Record, curves: Sequence[tuple[str, list[float], list[float]]], name: str) -> str:
    gap = 22.0  # a row: its name, then its curve
    band = min(max(560.0 / len(curves) - gap, 26.0), 110.0)
    height = TOP + len(curves) * (band + gap) + BOTTOM
    figure = _canvas(height)
    for index, (layer, x, y) in enumerate(curves, 1):
        axes = _axes(figure, record, bottom=height - TOP - index * (band + gap), height=band)
        axes.fill_between(x, y, color=SPARSE, alpha=0.22, lw=0)
        axes.plot(x, y, color=SPARSE, lw=1.6, clip_on=False)
        axes.set_ylim(0, max(max(y), 1e-12))
        axes.set_yticks([])
        axes.annotate(
            clean(layer, 48), (0, 1), (0, 4), "axes fraction", "offset points", color=INK, size=11.5, parse_math=False
        )
        _label_lines(axes, [(y[-1], percent(y[-1]), SPARSE)])
        axes.tick_params(labelbottom=index == len(curves))
        if index == len(curves):
            _epoch_name(axes)
    return _svg(figure, name)


def units(layers: Sequence[Units]) -> list[str]:
    """Neurons or filters of every layer before and after shrinking: bars from zero on one scale.

    One figure, or two to stand side by side where there are many layers; none if there is no layer.
    """
    shown = [layer for layer in layers if layer.before[0] > 0]
    largest = sorted(shown, key=lambda layer: -layer.before[0])[:MAX_LAYERS]
    shown = [layer for layer in shown if layer in largest][:MAX_LAYERS]
    rows = [(one.layer, one.before[0], one.after[0], f"{one.after[0]:,} of {one.before[0]:,}") for one in shown]
    return _columns(rows, "units")


def densities(layers: Sequence[LayerSparsity]) -> list[str]:
    """Density of every layer, of the largest ones where there are many: bars from zero on one scale, as `units`."""
    largest = sorted(layers, key=lambda layer: -layer.weights[1])[:MAX_LAYERS]
    rows = [(one.name, 0.0, one.density, percent(one.density)) for one in layers if one in largest]
    return _columns(rows[:MAX_LAYERS], "densities")


def _columns(bars: Sequence[Bar], name: str) -> list[str]:
    if len(bars) <= ONE_COLUMN:
        return [_bars(bars, bars, name)] if bars else []
    half = (len(bars) + 1) // 2
    return [_bars(bars[:half], bars, name), _bars(bars[half:], bars, f"{name}-more")]


def _bars(bars: Sequence[Bar], scale: Sequence[Bar], name: str) -> str:
    gap, band, left = 18.0, 16.0, 2.0  # a row: its name, then its bar
    pitch = gap + band + 8
    height = len(bars) * pitch + 4
    figure = _canvas(height)
    axes = figure.add_axes((left / WIDTH, 0, (WIDTH - left - RIGHT) / WIDTH, 1))
    axes.set_axis_off()
    axes.set_xlim(0, max(max(size for _, *pair, _ in scale for size in pair), 1e-12))
    axes.set_ylim(height, 0)
    for index, (layer, before, alive, text) in enumerate(bars):
        top = index * pitch + gap
        axes.barh(top, before, band, align="edge", color=DENSE, alpha=0.3, lw=0)
        axes.barh(top, alive, band, align="edge", color=SPARSE, lw=0)
        axes.annotate(clean(layer, 48), (0, top - 5), color=INK, size=11.5, parse_math=False)
        axes.annotate(
            text, (1, top + band / 2), (9, 0), ("axes fraction", "data"),
            "offset points", va="center", color=SPARSE, size=11.5, weight="bold", parse_math=False,
        )  # fmt: skip
    return _svg(figure, name)


def shown_layers(record: Record) -> list[str]:
    """The layers that a picture shows: all, in network order, or the `MAX_LAYERS` largest where there are more."""
    names = record.layers
    if len(names) <= MAX_LAYERS:
        return names
    sizes = record.last.get("size_layers")
    size = (lambda name: -(number(sizes.get(name)) or 0)) if isinstance(sizes, dict) else (lambda name: 0)
    kept = set(sorted(names, key=size)[:MAX_LAYERS])
    return [name for name in names if name in kept]


def _positive(curve: tuple[list[float], list[float]]) -> tuple[list[float], list[float]]:
    """The part of a curve that a logarithmic axis can show."""
    pairs = [(x, y) for x, y in zip(*curve, strict=True) if y > 0]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _canvas(height: float) -> "Figure":
    from matplotlib.figure import Figure  # not pyplot: its state belongs to the user

    return Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor="none")


def _figure(record: Record) -> tuple["Figure", "Axes"]:
    figure = _canvas(HEIGHT)
    return figure, _axes(figure, record, bottom=BOTTOM, height=HEIGHT - TOP - BOTTOM)


def _axes(figure: "Figure", record: Record, *, bottom: float, height: float) -> "Axes":
    """Axes at a place given in points: equal margins in every figure, so that the epochs align down the page."""
    from matplotlib.ticker import MaxNLocator

    total = figure.get_figheight() * 72
    axes = figure.add_axes((LEFT / WIDTH, bottom / total, (WIDTH - LEFT - RIGHT) / WIDTH, height / total))
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelcolor=MUTED, labelsize=11.5, pad=7)
    first, last = (float(record.epochs[i]["epoch"]) for i in (0, -1))
    if record.twin is not None and record.twin.epochs:
        last = max(last, float(record.twin.epochs[-1]["epoch"]))
    axes.set_xlim(first, max(last, first + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(y=0.08)
    for at, _ in record.marks:
        axes.axvline(at, color=MUTED, lw=1, ls=(0, (1, 3)), zorder=0)
    return axes


def _percent_axis(axes: "Axes") -> None:
    _linear_axis(axes, lambda v: f"{100 * v:.6g} %")


def _linear_axis(axes: "Axes", text: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))


def _log_axis(axes: "Axes", values: Sequence[float], text: Callable[[float], str]) -> None:
    """Logarithmic y axis round `values` (all positive) with plain labels: 0.5 %, 1 %, 2 %."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values) / 1.25, max(values) * 1.25
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(range(10, 100, 5))):  # coarsest with 3 labels
        scale = 10 if steps[0] == 10 else 1
        ticks = [float(f"{s / scale * 10.0**d:.12g}") for d in decades for s in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            break
    ticks = ticks[:: math.ceil(len(ticks) / 8)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: text(v)))


def _label_lines(axes: "Axes", labels: Sequence[Label]) -> None:
    """Write each text beside the right end of its line, pushed apart where they would overlap."""
    height = axes.get_position().height * cast("Figure", axes.figure).get_figheight() * 72
    gap = 15 / height
    axes.get_ylim()  # matplotlib scales late: without this the places would be those of an empty figure
    ends = sorted(
        (float(axes.transAxes.inverted().transform(axes.transData.transform((0, y)))[1]), text, colour)
        for y, text, colour in labels
    )
    places = [min(max(place, 0.0), 1.0) for place, _, _ in ends]
    centre = list(places)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    for i in range(len(places) - 2, -1, -1):  # half of every push goes the other way
        overlap = places[i] - centre[i], places[i + 1] - centre[i + 1]
        if places[i + 1] - places[i] < gap * 1.01 and overlap[1] > overlap[0]:
            places[i] -= (overlap[1] - overlap[0]) / 2
            places[i + 1] -= (overlap[1] - overlap[0]) / 2
    for place, (_, text, colour) in zip(places, ends, strict=True):
        axes.annotate(
            text, (1, place), (9, 0), "axes fraction", "offset points", va="center", color=colour, size=11.5,
            weight="bold", parse_math=False,
        )  # fmt: skip


def _epoch_name(axes: "Axes") -> None:
    axes.annotate("epoch", (1, 0), (14, -7), "axes fraction", "offset points", va="top", color=MUTED, size=11.5)


def _finish(figure: "Figure", axes: "Axes", name: str, record: Record, labels: Sequence[Label]) -> str:
    axes.grid(axis="y", color=GRID, lw=1)
    axes.set_axisbelow(True)
    for at in sorted({at for at, _ in record.marks}):  # one text for what happened in the same epoch
        text = ", ".join(dict.fromkeys(clean(event, 20) for when, event in record.marks if when == at))
        axes.annotate(
            text, (at, 1), (3, 3), ("data", "axes fraction"), "offset points", color=MUTED, size=10.5, parse_math=False,
            annotation_clip=True,
        )  # fmt: skip
    _label_lines(axes, labels)
    _epoch_name(axes)
    return _svg(figure, name)


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an <svg> element that can stand in a page beside others."""
    file = io.StringIO()
    figure.savefig(file, format="svg", facecolor="none", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'(<svg[^>]*?) (?:width="[^"]*"|height="[^"]*")([^>]*?) (?:width|height)="[^"]*"', r"\1\2", svg, count=1
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # ids are the page's, not the figure's
    for variable, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
