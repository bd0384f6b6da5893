"""What a person sees while a network trains: a live table on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch_bregman.report.words import clean, near, number

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.live import Live
    from rich.segment import Segment
    from rich.table import Table

__all__ = ["Display"]

ROWS = 12  # epochs in the live table
LAYERS = 8  # layers with a bar; more would push the table off the screen
BAR = 20  # width of a layer's bar
WINDOW = 5.0  # seconds over which images/s is measured
REFRESH = 4.0  # renderings per second


class Display:
    """Live table and progress bar on a terminal; one plain line per epoch where output is no terminal (or quiet).

    `epochs`, `steps_per_epoch`: the length of the whole run. `asked`: the density asked for, or None. `console`: a rich
    console to write to, else standard output. `silent`: write nothing. `brief`: of the epochs the last one alone. Use
    it as a context manager: the terminal is restored on every way out.

    The training loop only counts, in `advance`. Rendering happens in rich's thread, four times a second, from numbers
    that the loop has already brought to the CPU. Where rich is not installed the plain lines are written.
    """

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        *,
        asked: float | None,
        console: "Console | None" = None,
        quiet: bool = False,
        title: str = "",
        silent: bool = False,
        brief: bool = False,
    ) -> None:
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.asked = asked
        self.title = clean(title, 100)
        self._file = console.file if console is not None else sys.stdout
        self._silent, self._brief = silent, brief
        self._console = None if quiet or silent else console if console is not None else _terminal()
        if self._console is not None and (not self._console.is_terminal or self._console.is_dumb_terminal):
            self._console = None
        self._live: Live | None = None
        self._rows: tuple[dict[str, Any], ...] = ()  # replaced, never changed: the rendering thread reads it
        self._header: tuple[str, str] | None = None  # of the plain table: (key, heading) of the measure it shows
        self._drawn: tuple[object, _Lines] | None = None  # the table, and what it was drawn for
        self._steps = self._images = 0
        self._first_step = 0
        self._loss: float | None = None
        self._begun = time.perf_counter()
        self._seen: deque[tuple[float, int]] = deque([(self._begun, 0)])  # (time, images) of the last renderings

    def __enter__(self) -> "Display":
        if self._console is not None:
            from rich.live import Live

            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=REFRESH)
            self._live.start()
        elif self.title:
            self._line(self.title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()  # draws a last time, shows the cursor, gives stdout back

    def start(self, epoch: int) -> None:
        """Say that `epoch` epochs are behind us: 0 for a new run, more for a resumed one."""
        self._steps = self._first_step = epoch * self.steps_per_epoch
        self._begun = time.perf_counter()
        self._seen = deque([(self._begun, self._images)])

    def advance(self, images: int) -> None:
        """Count one step over `images` images. Two additions: the loop may call it at every step."""
        self._steps += 1
        self._images += images

    def loss(self, value: float) -> None:
        """Show `value` as the current training loss. A float: the caller decides when to wait for the device."""
        self._loss = value

    def epoch(self, row: dict[str, Any]) -> None:
        """Add the line of an epoch, as metrics.jsonl holds it; keys that are missing leave a gap."""
        self._rows = (*self._rows, row)[-1 if self._brief else -ROWS :]
        done = number(row.get("epoch"))
        if done is not None:  # a partial batch or a skipped step must not let the bar drift
            self._steps = round(done * self.steps_per_epoch)
        if self._console is None and not (self._brief and done != self.epochs):
            self._plain(row)

    def message(self, text: str) -> None:
        """Print `text` above the live area, or as a line of its own."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._line(text)

    # Plain lines

    def _plain(self, row: dict[str, Any]) -> None:
        if self._header is None:
            self._header = _measure([row])
            heads = ("epoch", "train loss", self._header[1], "density", "lam", "seconds")
            self._line("  ".join(f"{head:>{width}}" for head, width in zip(heads, _WIDTHS, strict=True)))
        cells = _cells(row, self._header[0])
        line = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True))
        self._line(line + "  on target" if self._on_target(row) else line)

    def _line(self, text: str) -> None:
        if self._silent:
            return
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        # Training goes on where the log cannot show a character, as with LANG=C.
        self._file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._file.flush()

    def _on_target(self, row: dict[str, Any]) -> bool:
        return near(number(row.get("density")), self.asked)

    # The live area. Runs in rich's thread: reads what the loop writes, and tolerates being one step behind.

    def _render(self) -> "RenderableType":
        from rich.console import Group

        assert self._console is not None
        what = (self._rows, self._console.width, self._console.height)
        drawn = self._drawn
        if drawn is None or drawn[0] != what:  # laying out a table takes 20 ms that the training loop would wait for
            lines = self._console.render_lines(self._epoch_table(*what), pad=False)
            self._drawn = drawn = (what, _Lines(lines))
        return Group(drawn[1], self._progress(self._console.width))

    def _epoch_table(self, rows: tuple[dict[str, Any], ...], width: int, height: int) -> "RenderableType":
        """The newest epochs, and beside or below them the layers of the last one, as far as the screen has room."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        layers = self._layer_bars(rows[-1]) if rows and not self._brief else None
        beside = width >= 104
        room = height - 7 - (0 if beside or layers is None else layers.row_count + 1)
        key, heading = _measure(rows)
        table = Table(
            box=box.SIMPLE_HEAD,
            title=Text(self.title) if self.title else None,
            title_justify="left",
            title_style="bold",
        )
        for head in ("epoch", "train loss", heading, "density", "λ", "seconds"):
            table.add_column(head, justify="right", header_style="dim", no_wrap=True)
        for row in rows[-max(room, 3) :]:
            cells = _cells(row, key)
            cells[3] = f"[green]{cells[3]} ●[/]" if self._on_target(row) else f"{cells[3]}  "
            table.add_row(*cells)
        if layers is None:
            return table
        grid = Table.grid(padding=(0, 4, 0, 0))
        if beside:
            layers_below_header = Table.grid()
            for _ in range(4 if self.title else 3):  # level with the table's first line
                layers_below_header.add_row("")
            layers_below_header.add_row(layers)
            grid.add_row(table, layers_below_header)
        else:
            grid.add_row(table)
            if height >= 16:
                grid.add_row(layers)
                grid.add_row("")
        return grid

    def _layer_bars(self, row: dict[str, Any]) -> "Table | None":
        """Density of each layer as a bar; the longest is the densest layer."""
        from rich.table import Table
        from rich.text import Text

        found = row.get("layers")
        layers = (
            [(name, d) for name, v in found.items() if (d := number(v)) is not None] if isinstance(found, dict) else []
        )
        if not layers:
            return None
        most = max(density for _, density in layers) or 1.0
        grid = Table.grid(padding=(0, 1))
        for name, density in layers[:LAYERS]:
            eighths = round(8 * BAR * max(density, 0.0) / most)
            bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
            grid.add_row(Text(clean(name, 28)), Text(f"{bar or '▏':<{BAR}}", "cyan"), Text(f"{100 * density:7.2f} %"))
        if len(layers) > LAYERS:
            grid.add_row(Text(f"and {len(layers) - LAYERS} more", "dim"))
        return grid

    def _progress(self, width: int) -> "RenderableType":
        """One line: bar, epoch, loss, images/s and time left."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now, steps, images = time.perf_counter(), self._steps, self._images
        self._seen.append((now, images))
        while len(self._seen) > 2 and now - self._seen[1][0] > WINDOW:
            self._seen.popleft()
        total = max(self.epochs * self.steps_per_epoch, 1)
        rate = (images - self._seen[0][1]) / max(now - self._seen[0][0], 1e-9)
        done = steps - self._first_step
        left = (
            (now - self._begun) * max(total - steps, 0) / done if done > 0 else None
        )  # evaluation is part of the pace
        parts = [f"epoch {min(steps // max(self.steps_per_epoch, 1) + 1, self.epochs)}/{self.epochs}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if steps < total:
            parts += [f"{rate:,.0f} images/s", f"{_clock(left)} left"]
        else:
            parts.append(f"{_clock(now - self._begun)} in all")
        line = Table.grid(padding=(0, 2))
        text = Text("   ".join(parts), no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=total, completed=min(steps, total), width=max(10, min(36, width - len(text) - 3)))
        line.add_row(bar, text)
        return line


class _Lines:
    """Lines that rich has laid out already."""

    def __init__(self, lines: "list[list[Segment]]") -> None:
        self.lines = lines

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Segment]":
        from rich.segment import Segment

        for line in self.lines:
            yield from line
            yield Segment.line()


_WIDTHS = (5, 10, 8, 9, 9, 8)


def _measure(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """(key, heading) of the validation measure: the loss where there is no accuracy, as with an autoencoder."""
    if any("val_accuracy" in row for row in rows) or not any("val_loss" in row for row in rows):
        return "val_accuracy", "val acc."
    return "val_loss", "val loss"


def _cells(row: dict[str, Any], key: str) -> list[str]:
    """epoch, train loss, validation measure, density, λ, seconds as text; "-" for what is not known."""
    value = {name: number(row.get(name)) for name in ("epoch", "train_loss", key, "density", "lam", "seconds")}
    form = ("{:g}", "{:.4f}", "{:.2%}" if key == "val_accuracy" else "{:.4f}", "{:.3%}", "{:.4g}", "{:.1f}")
    return [f.format(v) if v is not None else "-" for f, v in zip(form, value.values(), strict=True)]


def _clock(seconds: float | None) -> str:
    """Seconds as 0:07, 12:05 or 2:13:09."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _terminal() -> "Console | None":
    """A rich console if standard output is a terminal (forced colours make none) and rich is installed, else None."""
    if not sys.stdout.isatty():
        return None
    with contextlib.suppress(ImportError):
        from rich.console import Console

        return Console()
    return None
