"""A picture of a network in a loop of one's own: the density of each layer, and where its weights are alive."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor, nn

from torch_bregman.density import sparsity_report
from torch_bregman.distributed import whole
from torch_bregman.files import write_atomically
from torch_bregman.layers import weight_layers
from torch_bregman.report import plots
from torch_bregman.report.patterns import page_size, png_data_uri, weight_pattern
from torch_bregman.report.words import clean, percent

__all__ = ["Picture", "picture"]


@dataclass(frozen=True, repr=False)
class Picture:
    """Mark-up that a notebook draws; `write` keeps it as a page of one file."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def write(self, path: str | Path) -> Path:
        """Write it as an HTML page that needs no network, and return its path."""
        page = f"<!doctype html><meta charset=utf-8><title>torch-bregman</title><body>{self.html}</body>"
        write_atomically(Path(path), page.encode("utf-8", errors="replace"), shared=True)
        return Path(path)


def picture(model: nn.Module) -> Picture:
    """The density of each layer of `model` as a bar, and where its weights are alive, a pixel each or a block of them.

    Of more than 40 layers the largest ones are drawn. Needs the extra 'train'.
    """
    report = sparsity_report(model)
    with plots.style():
        bars = plots.densities(report.layers)
    largest = {one.name for one in sorted(report.layers, key=lambda one: -one.weights[1])[: plots.MAX_LAYERS]}
    density = {one.name: one.density for one in report.layers}
    drawn = [
        _drawn(name, weight, density[name])
        for name, _, weight in weight_layers(model)
        if name in largest and weight.numel()
    ]
    colours = "".join(f"--{name}:{colour};" for name, colour in plots.COLOURS.items())
    text = f"{percent(report.density)} of {report.weights[1]:,} weights; {report.coverage}"
    return Picture(
        f'<div style="{colours}font-family:sans-serif;max-width:{plots.WIDTH:g}px"><p>{escape(text)}</p>'
        f'{"".join(bars)}<div style="display:flex;flex-wrap:wrap;gap:16px">{"".join(drawn)}</div></div>'
    )


def _drawn(name: str, weight: Tensor, density: float) -> str:
    pattern = weight_pattern(whole(weight.detach(), lambda part: part))
    width, height = page_size(pattern)
    return (
        f'<figure style="margin:0"><figcaption>{escape(clean(name, 48))}, {percent(density)}</figcaption><img alt="" '
        f'style="image-rendering:pixelated" width="{width}" height="{height}" src="{png_data_uri(pattern)}"></figure>'
    )
