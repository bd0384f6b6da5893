"""Writes the page: gathers text and figures, and fills the template. All that comes from files is escaped."""

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torch_bregman.extras import needs_extra
from torch_bregman.files import write_atomically
from torch_bregman.report import plots
from torch_bregman.report.patterns import page_size, png_data_uri
from torch_bregman.report.records import Record, read_patterns, read_run, table
from torch_bregman.report.summary import tiles, title
from torch_bregman.report.words import ON_TARGET, clean, number, percent

__all__ = ["write_report"]


@dataclass(frozen=True)
class Figure:
    """A plot with what to look for in it. `svgs` are our own mark-up, side by side; the template escapes the texts."""

    name: str
    title: str
    svgs: list[str]
    caption: str


@dataclass(frozen=True)
class Picture:
    """One weight pattern; `width` and `height` in pixels of the page."""

    when: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Layer:
    """A layer's line in the table and the heading of its patterns; a part that is not known is empty."""

    name: str
    shape: str
    kept: str
    size: str
    density: str


@dataclass(frozen=True)
class Choice:
    """How a layer computed in the coarse phases of a multilevel run; a part that is not known is empty."""

    layer: str
    computes: str
    density: str
    dense: str
    sparse: str
    faster: str


def write_report(run: str | Path) -> Path:
    """Write RUN/report.html for the run in the folder `run` and return its path.

    The page is one file that needs no network. A part that the run has not recorded is left out; the file is written
    under a temporary name and then moved, so that a reader never meets half a page. Raises FileNotFoundError if `run`
    is no folder, and ImportError naming the extra if jinja2, matplotlib or pillow are missing.
    """
    with needs_extra("train"):
        import jinja2
    record = read_run(run)
    patterns = read_patterns(record)
    layers = {name: _layer(record, name, patterns.get(name, {})) for name in dict.fromkeys([*record.layers, *patterns])}
    shown = [name for name in plots.shown_layers(record) or patterns if name in patterns]
    with plots.style():
        figures = _figures(record)
        units = plots.units(record.proof.units) if record.proof is not None else []
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("torch_bregman.report").joinpath("template.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(template).render(
        title=title(record),
        tiles=tiles(record),
        figures=figures,
        patterns=[(layers[name], _pictures(patterns[name])) for name in shown[: plots.MAX_LAYERS]],
        patterns_left_out=len(patterns) - len(shown[: plots.MAX_LAYERS]),
        layers=[layers[name] for name in record.layers],
        choices=_choices(record),
        uncounted=clean((record.end or {}).get("uncounted") or "", 500),
        last_epoch=number(record.last.get("epoch")),
        recipe=[(clean(key), _value(value)) for key, value in record.recipe.items()],
        note=clean((record.end or {}).get("note") or "", 500),
        ended=record.end is not None,
        notes=[clean(note, 300) for note in record.notes],
        proof=record.proof,
        units=units,
    )
    path = record.path / "report.html"
    # A run that still trains may be reported on meanwhile.
    write_atomically(path, page.encode("utf-8", errors="replace"), shared=True)
    return path


def _figures(record: Record) -> list[Figure]:
    """The plots that the run's measurements allow, in reading order."""
    if not record.epochs:
        return []
    held = record.asked is None
    rival = "the dense one" if record.twin is not None else "the top, of an axis that does not begin at zero"
    dots = "" if held else f"; dots are epochs on target, within ±{100 * ON_TARGET:g} % of the density asked for"
    ring = (
        ", and the ring is the epoch that was kept" if number((record.end or {}).get("best_epoch")) is not None else ""
    )
    work, levels = plots.work(record), bool(record.work[0])
    if levels and record.twin is not None:
        pace = (
            "Look for how far the sparse curve lies below the dense one; an epoch that tries out layers takes longer."
        )
    elif levels:
        pace = "Look for the curve staying low while weights enter; an epoch that tries out layers takes longer."
    elif record.twin is not None:
        pace = "Look for two curves near each other: both runs compute with all weights, dead or alive."
    else:
        pace = "Look for a level curve: this run computes with all weights, dead or alive."
    most = f", the {plots.MAX_LAYERS} largest" if len(record.layers) > plots.MAX_LAYERS else ""
    parts = [
        ("accuracy", "Validation accuracy", plots.accuracy(record),
         f"Look for how close the sparse curve comes to {rival}{dots}{ring}."),
        ("loss", "Loss", plots.loss(record),
         "Look for validation turning up while training still falls: there the network begins to learn by heart."),
        ("density", "Density", plots.density(record),
         "The network starts nearly empty; look for "
         + ("where the curve settles by itself." if held else "the curve meeting the dashed line and staying on it.")),
        ("layers", "Density of each layer" + most, plots.layers(record),
         "Weights enter as they matter: look for which layers grow first, each drawn from zero to its own maximum, "
         "with its density at the end on the right."),
        ("lam", "λ, the strength of the regularizer", plots.lam(record),
         "λ was held fixed, so look for a straight line." if held
         else "The controller raises λ while the network is too dense; look for λ settling before the end."),
        ("seconds", "Time per epoch", plots.seconds(record),
         f"{pace} Training steps without validation; a resumed epoch counts from where it went on."),
        ("work", "Work per epoch", work,
         "FLOPs as a share of those of dense steps; look for how far below them the curve stays while weights enter. "
         "By formula: a dense step is 3 forward passes of all Linear and Conv layers (2 × weights × positions × batch "
         "each), a sparse layer's step that times its density, and in a fine step a sparse layer's forward and its "
         "gradient to the input times density plus the full weight gradient. A layer of a smaller dense network "
         "counts with what is left of it."),
    ]  # fmt: skip
    figures = []
    for name, heading, drawn, caption in parts:
        svgs = drawn if isinstance(drawn, list) else [drawn] if drawn is not None else []
        if svgs:
            figures.append(Figure(name, heading, svgs, caption))
    return figures


def _layer(record: Record, name: str, pictures: dict[str, NDArray[np.uint8]]) -> Layer:
    density = number(table(record.last, "layers").get(name))
    kept = number(table(record.last, "kept_layers").get(name))
    size = number(table(record.last, "size_layers").get(name))
    shape = table(record.last, "shape_layers").get(name)
    if not isinstance(
        shape, list
    ):  # a picture with as many pixels as the layer has weights tells the shape as a matrix
        pixels = next((picture.shape for picture in pictures.values()), ())
        shape = list(pixels) if size is not None and math.prod(pixels) == size else []
    return Layer(
        name=clean(name, 80),
        shape=" × ".join(clean(side, 12) for side in shape[:8]),
        kept="" if kept is None else f"{kept:,.0f}",
        size="" if size is None else f"{size:,.0f}",
        density="" if density is None else percent(density),
    )


def _choices(record: Record) -> list[Choice]:
    """The lines of the table of choices, without those that are none."""
    made = []
    rows = (record.end or {}).get("choices")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, dict) or not isinstance(row.get("layer"), str):
            continue
        density, dense, sparse = (number(row.get(key)) for key in ("density", "dense_ms", "sparse_ms"))
        faster = number(dense / sparse) if dense is not None and sparse is not None and sparse > 0 else None
        computes = row.get("computes")
        made.append(
            Choice(
                layer=clean(row["layer"], 80),
                computes=clean(computes, 20) if isinstance(computes, str) else "",
                density="" if density is None else percent(density),
                dense="" if dense is None else f"{dense:,.3f}",
                sparse="" if sparse is None else f"{sparse:,.3f}",
                faster="" if faster is None else f"{faster:,.1f} ×",
            )
        )
    return made


def _pictures(pictures: dict[str, NDArray[np.uint8]]) -> list[Picture]:
    """The pictures of one layer, from the start to the end."""
    made = []
    for when in ("start", "middle", "end"):
        if when in pictures and pictures[when].size:
            made.append(Picture(when, png_data_uri(pictures[when]), *page_size(pictures[when])))
    return made


def _value(value: object) -> str:
    """A recipe's value as TOML writes it, near enough to be read."""
    return clean(str(value).lower() if isinstance(value, bool) else value, 200)
