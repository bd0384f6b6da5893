"""`torch-bregman report`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..report import terminal_summary, write_report
from .app import app
from .runs import read_recipe


@app.command
def report(run: Path, /) -> None:
    """Write RUN/report.html again from the files of a run folder, also of one that is still training.

    Parameters
    ----------
    run
        The run folder.
    """
    read_recipe(run)
    path = write_report(run)
    Console().print(terminal_summary(run))
    print(path)
