"""What is shown while a network trains: readable in a log, gone from the terminal's settings afterwards."""

import io
import os
import subprocess
import sys
import time

import pytest

pytest.importorskip("rich")

from rich.console import Console

from torch_bregman.train.display import Display


def row(epoch: int, **changes: object) -> dict[str, object]:
    made: dict[str, object] = {
        "epoch": epoch, "train_loss": None if epoch == 0 else 0.5, "val_loss": 0.4, "val_accuracy": 0.97,
        "density": 0.05 if epoch > 1 else 0.012, "lam": 1.3, "lr": 0.01, "seconds": 1.44, "images_per_second": 4e4,
        "on_target": epoch > 1, "layers": {"0.weight": 0.01, "2.weight": 0.3},
    }  # fmt: skip
    made.update(changes)
    return made


def terminal(**options: object) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    settings: dict[str, object] = {"width": 120, "height": 40, "color_system": "standard", **options}
    return Console(file=file, force_terminal=True, **settings), file  # type: ignore[arg-type]


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(3, 10, asked=0.05, title="lenet on mnist") as display:
        display.start(0)
        for epoch in range(4):
            for _ in range(10):
                display.advance(128)
            display.loss(0.3)
            display.epoch(row(epoch))
        display.message("saved [bold]x[/bold]")
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert lines[0] == "lenet on mnist"
    assert lines[1].split() == ["epoch", "train", "loss", "val", "acc.", "density", "lam", "seconds"]
    assert lines[2].split() == ["0", "-", "97.00%", "1.200%", "1.3", "1.4"]
    assert [line.endswith("on target") for line in lines[2:6]] == [False, False, True, True]
    assert len({len(line.removesuffix("  on target")) for line in lines[1:6]}) == 1  # aligned
    assert lines[6] == "saved [bold]x[/bold]"


def test_of_a_brief_run_the_last_epoch_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(3, 10, asked=None, title="dense twin", brief=True) as display:
        for epoch in range(4):
            display.epoch(row(epoch))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["dense", "epoch", "3"]
    console, file = terminal()
    with Display(3, 10, asked=None, console=console, brief=True) as display:
        for epoch in range(4):
            display.epoch(row(epoch))
    last = file.getvalue().rpartition("epoch")[0].rpartition("val acc.")[2]
    assert "0.weight" not in file.getvalue()
    assert last.count("97.00%") == 1


@pytest.mark.parametrize("asked", [None, 0.05])
def test_quiet_is_plain_on_a_terminal_too(asked: float | None) -> None:
    console, file = terminal()
    with Display(3, 10, asked=asked, console=console, quiet=True) as display:
        display.epoch(row(2))
    assert "\x1b" not in file.getvalue()
    assert ("on target" in file.getvalue()) == (asked is not None)


def test_forced_colours_in_a_pipe_stay_plain() -> None:
    code = ("from torch_bregman.train.display import Display\n"
            "with Display(1, 1, asked=None) as d: d.message('λ'); d.epoch({'epoch': 1, 'val_loss': 0.1})")  # fmt: skip

    environment = {**os.environ, "FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=True, timeout=60)
    assert b"\x1b" not in done.stdout
    assert done.stdout.startswith(b"?\n")  # a log that cannot show λ does not end the training
    assert b"val loss" in done.stdout


def test_live_area_shows_table_layers_and_progress() -> None:
    console, file = terminal()
    with Display(20, 10, asked=0.05, console=console, title="lenet [x]") as display:
        display.start(3)
        for epoch in range(4, 18):
            display.advance(64)
            display.loss(0.1234)
            display.epoch(row(epoch))
        display.message("a message")
    last = file.getvalue().rsplit("lenet [x]", 1)[1]
    for text in ("97.00%", "5.000% ●", "2.weight", "30.00 %", "epoch 18/20", "loss 0.1234", "images/s", "left"):
        assert text in last, text
    assert "\x1b[32m" in last  # on target in green
    assert " 5  " not in last.split("seconds")[0]
    assert "a message" in file.getvalue()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_terminal_is_restored(error: type[BaseException]) -> None:
    console, file = terminal()
    stdout, stderr = sys.stdout, sys.stderr
    display = Display(3, 10, asked=0.05, console=console)

    def train() -> None:
        with display:
            assert "\x1b[?25l" in file.getvalue()  # the cursor is hidden
            display.epoch(row(1))
            raise error

    with pytest.raises(error):
        train()
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")
    assert (sys.stdout, sys.stderr) == (stdout, stderr)
    display.message("after")  # still allowed, as a plain line
    assert file.getvalue().endswith("after\n")


@pytest.mark.parametrize("width", [20, 80, 200])
@pytest.mark.parametrize("height", [5, 24, 60])
def test_fits_the_screen(width: int, height: int) -> None:
    console, _ = terminal(width=width, height=height)
    display = Display(20, 10, asked=0.05, console=console, title="x")
    for epoch in range(20):
        display.epoch(row(epoch, layers={f"{i}.weight": i / 30 for i in range(30)}))
    lines = console.render_lines(display._render(), pad=False)
    assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
    if height >= 24 and width >= 80:
        assert len(lines) <= height


def test_rows_with_gaps_and_without_layers() -> None:
    console, file = terminal()
    with Display(0, 0, asked=None, console=console) as display:
        display.epoch({"epoch": 1, "val_loss": float("nan"), "layers": {"a": None, "b": 0.0}})
        display.epoch({})
    assert "val loss" in file.getvalue()


def test_advance_costs_next_to_nothing() -> None:
    display = Display(1, 1, asked=None, quiet=True)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10_000):
            display.advance(128)
        best = min(best, (time.perf_counter() - begun) / 10_000)
    assert best < 3e-6


def test_rendering_is_cheap_between_epochs() -> None:
    console, _ = terminal()
    display = Display(20, 10, asked=0.05, console=console)
    display.epoch(row(1))
    first = display._render().renderables[0]  # type: ignore[union-attr]
    assert display._render().renderables[0] is first  # type: ignore[union-attr]
    display.epoch(row(2))
    assert display._render().renderables[0] is not first  # type: ignore[union-attr]
