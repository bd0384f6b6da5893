"""What a run is summed up with: the tiles of the page, and the same lines on the terminal."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch_bregman.extras import needs_extra
from torch_bregman.report.records import Record, read_run
from torch_bregman.report.words import clean, duration, near, number, percent, points, short

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Tile", "terminal_summary", "tiles", "title"]


@dataclass(frozen=True)
class Tile:
    """One figure of the headline. `good` is True or False where it can be judged, else None."""

    name: str
    value: str
    detail: str = ""
    good: bool | None = None


def title(record: Record) -> str:
    """ "lenet on mnist, trained sparse with adabreg", as far as the recipe says."""
    model, data, optimizer = (record.recipe.get(key) for key in ("model", "dataset", "optimizer"))
    if not model and not data:
        return f"Run {clean(record.path.resolve().name)}"
    text = " on ".join(clean(part) for part in (model, data) if part)
    return f"{text}, trained sparse with {clean(optimizer)}" if optimizer else text


def tiles(record: Record) -> list[Tile]:
    """The headline, one tile per thing that is known."""
    made = (_density(record), _measure(record), _best(record), _time(record), _lam(record), _work(record))
    return [tile for tile in made if tile is not None]


def _density(record: Record) -> Tile | None:
    got, asked = record.got, record.asked
    if got is None:
        return Tile("Density", f"asked {percent(asked)}") if asked is not None else None
    kept, weights = (number((record.end or {}).get(key)) for key in ("kept", "weights"))
    detail = f"{kept:,.0f} of {weights:,.0f} weights" if kept is not None and weights is not None else ""
    if asked is None:
        return Tile("Density", f"got {percent(got)}", "; ".join(filter(None, (detail, "λ was held fixed"))))
    good = near(got, asked)
    if not good and asked > 0:
        detail = "; ".join(filter(None, (detail, f"{100 * (got / asked - 1):+.1f} % off".replace("-", "−"))))
    return Tile("Density", f"asked {percent(asked)} / got {percent(got)}", detail, good)


def _measure(record: Record) -> Tile | None:
    """Test accuracy, or test loss, or what there is of the validation set; the twin is compared on the same measure."""
    twin = record.twin
    for key, name in (
        ("test_accuracy", "Test accuracy"),
        ("test_loss", "Test loss"),
        ("val_accuracy", "Validation accuracy"),
        ("val_loss", "Validation loss"),
    ):
        value = record.final(key)
        if value is None:
            continue
        dense = twin.final(key) if twin is not None else None
        if key.endswith("accuracy"):
            detail = f"dense twin {percent(dense)}, {points(value - dense)}" if dense is not None else ""
            return Tile(name, percent(value), detail)
        return Tile(name, short(value), f"dense twin {short(dense)}" if dense is not None else "")
    return None


def _best(record: Record) -> Tile | None:
    best = number((record.end or {}).get("best_epoch"))
    if best is None:
        return None
    last = number(record.last.get("epoch"))
    name = "Best epoch" if record.asked is None else "Best on-target epoch"
    return Tile(name, f"{best:g}", f"of {last:g}" if last is not None else "")


def _time(record: Record) -> Tile | None:
    seconds = _seconds(record)
    if not seconds:
        return None
    dense = _seconds(record.twin) if record.twin is not None else 0.0
    return Tile("Training time", duration(seconds), f"dense twin {duration(dense)}" if dense else "")


def _seconds(record: Record) -> float:
    total = number((record.end or {}).get("seconds"))
    return total if total is not None else sum(number(row.get("seconds")) or 0.0 for row in record.epochs)


def _lam(record: Record) -> Tile | None:
    lam = number(record.last.get("lam"))
    return Tile("λ at the end", short(lam)) if lam is not None else None


def _work(record: Record) -> Tile | None:
    """FLOPs of a multilevel run beside those of dense steps."""
    flops, dense = record.final("flops"), record.final("dense_flops")
    if flops is None or dense is None or flops < 0 or dense <= 0 or (share := number(flops / dense)) is None:
        return None
    fine, coarse = record.final("fine_steps"), record.final("coarse_steps")
    detail = f"{fine:,.0f} fine and {coarse:,.0f} coarse steps" if fine is not None and coarse is not None else ""
    return Tile("Work", f"{percent(share)} of dense FLOPs", detail)


def terminal_summary(run: str | Path) -> "RenderableType":
    """The headline of the run in the folder `run` for a rich console, with the path of its report if it was written."""
    with needs_extra("train"):
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text
    record = read_run(run)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", style="dim", no_wrap=True)
    grid.add_column()
    for tile in tiles(record):
        line = Text(tile.value, style={True: "bold green", False: "bold yellow", None: "bold"}[tile.good])
        if tile.detail:
            line.append(f"   {tile.detail}", style="not bold default")
        grid.add_row(tile.name.lower(), line)
    note = clean((record.end or {}).get("note") or ("" if record.end else "this run has not ended"), 200)
    if note:
        grid.add_row("note", Text(note))
    if uncounted := clean((record.end or {}).get("uncounted") or "", 200):
        grid.add_row("density", Text(uncounted))
    report = record.path / "report.html"
    if report.is_file():
        grid.add_row("report", Text(str(report)))
    return Panel(grid, title=Text(title(record)), title_align="left", expand=False, padding=(0, 1))
