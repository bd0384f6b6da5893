"""From the words of the command line to a command, and from what goes wrong to one sentence."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import cyclopts
from rich.console import Console
from rich.text import Text

from ..data import DataError
from ..train.errors import RunError
from .app import app


def main(argv: list[str] | None = None) -> None:
    """Run a command; errors a person can act on are one sentence and exit code 1, never a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    plain = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"  # without lines of code that nobody here wrote
    try:
        argv = expand_resume(argv)
        app.config = None  # of an earlier call
        for i, word in enumerate(argv):
            path = word.partition("=")[2] if word.startswith("--config=") else None
            if word == "--config" and i + 1 < len(argv):
                path = argv[i + 1]
            if path is not None:
                if not Path(path).is_file():
                    raise RunError(f"The file {path} of --config does not exist.")
                app.config = [cyclopts.config.Toml(path, must_exist=True, use_commands_as_keys=False)]
        app(argv)
    except (RunError, DataError, ValueError) as error:
        errors.print(_error(str(error)))
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        sys.exit(130)
    except OSError as error:
        errors.print(_error(f"{error.strerror or error}: {error.filename or ''}"))
        sys.exit(1)
    finally:
        warnings.formatwarning = plain


def expand_resume(argv: list[str]) -> list[str]:
    """Let `--resume` stand alone: it then means the folder of --out."""
    if "--resume" not in argv:
        return argv
    i = argv.index("--resume")
    if i + 1 < len(argv) and not argv[i + 1].startswith("-"):
        return argv
    folder = next((argv[k + 1] for k, a in enumerate(argv[:-1]) if a in ("--out", "-o")), None)
    folder = folder or next((a.partition("=")[2] for a in argv if a.startswith("--out=")), None)
    if folder is None:
        raise RunError("--resume needs the run folder: torch-bregman train --resume runs/NAME.")
    return [*argv[:i], "--resume", folder, *argv[i + 1 :]]


def _error(text: str) -> Text:
    rank = f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    return Text.assemble(("Error: ", "bold red"), rank, " ".join(text.split()))
