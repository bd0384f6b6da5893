"""Reads a run folder. Every part is optional: a run that was killed is exactly the run one wants to look at."""

import json
import tomllib
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torch_bregman.proof import Proof
from torch_bregman.report.words import near, number

__all__ = ["Record", "read_patterns", "read_run", "series"]

Row = dict[str, Any]
Series = tuple[list[float], list[float]]


@dataclass
class Record:
    """One run as its files tell it. `epochs` is sorted, without repetitions; `end` is None while it has not ended."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    epochs: list[Row] = field(default_factory=list)
    end: Row | None = None
    marks: list[tuple[float, str]] = field(default_factory=list)  # (epoch, event) of "resume", "interrupted", ...
    notes: list[str] = field(default_factory=list)  # what could not be read
    twin: "Record | None" = None
    proof: Proof | None = None

    @property
    def last(self) -> Row:
        """The newest epoch's row, or an empty one."""
        return self.epochs[-1] if self.epochs else {}

    @property
    def asked(self) -> float | None:
        """The density asked for, or None where the run held λ fixed."""
        if self.end is not None and "asked_density" in self.end:
            return number(self.end["asked_density"])
        return number(self.recipe.get("density"))

    @property
    def got(self) -> float | None:
        """The density of the weights that the run hands over; of the newest epoch while it runs."""
        return self.final("density")

    def final(self, key: str) -> float | None:
        """`key` of the last line, or of the newest epoch."""
        value = number(self.end.get(key)) if self.end is not None else None
        return value if value is not None else number(self.last.get(key))

    def on_target(self, row: Row) -> bool:
        """What the row says of itself, or else what its density says."""
        said = row.get("on_target")
        return said if isinstance(said, bool) else near(number(row.get("density")), self.asked)

    @property
    def work(self) -> Series:
        """(epochs, FLOPs as a share of those of dense steps) of a multilevel run: of what each epoch added to the sums.

        Where the sums of an epoch are missing, the next one has the share of both.
        """
        x, y, before = [], [], (0.0, 0.0)
        for row in self.epochs:
            flops, dense = number(row.get("flops")), number(row.get("dense_flops"))
            if flops is None or dense is None:
                continue
            done, full = flops - before[0], dense - before[1]
            share = number(done / full) if done >= 0 and full > 0 else None
            if share is not None:
                x.append(float(row["epoch"]))
                y.append(share)
            before = flops, dense
        return x, y

    @property
    def layers(self) -> list[str]:
        """Names of the layers in network order."""
        return list(table(self.last, "layers"))


def table(row: Row, key: str) -> dict[str, Any]:
    """The dictionary `row[key]`, or an empty one."""
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def series(rows: Sequence[Row], key: str, *, inside: str | None = None) -> Series:
    """(epochs, values) of the rows where `key` is a finite number; `inside` names a dictionary that holds it."""
    pairs = [
        (float(row["epoch"]), value)
        for row in rows
        if (value := number((table(row, inside) if inside else row).get(key))) is not None
    ]
    return [x for x, _ in pairs], [y for _, y in pairs]


def read_run(run: str | Path) -> Record:
    """Read the folder `run` and, where there is one, its dense twin. Raises FileNotFoundError if `run` is no folder."""
    path = Path(run)
    if not path.is_dir():
        raise FileNotFoundError(
            f"`run` must be the folder of a run, got {str(path)!r}, which is no folder; of a network of your own loop "
            "write torch_bregman.report.picture(model)"
        )
    record = Record(path)
    _read_recipe(record)
    _read_metrics(record)
    if (path / "dense" / "metrics.jsonl").is_file():
        record.twin = Record(path / "dense")
        _read_metrics(record.twin)
        record.notes += [f"dense twin: {note}" for note in record.twin.notes]
        if not record.twin.epochs and record.twin.end is None:
            record.twin = None
    _read_proof(record)
    return record


def _read_recipe(record: Record) -> None:
    try:
        record.recipe = tomllib.loads((record.path / "recipe.toml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        record.notes.append("recipe.toml is missing")
    except (OSError, ValueError) as error:  # ValueError: not TOML, or not UTF-8
        record.notes.append(f"recipe.toml could not be read ({error})")


def _read_metrics(record: Record) -> None:
    try:
        lines = (record.path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        record.notes.append("metrics.jsonl is missing")
        return
    epochs: dict[float, Row] = {}
    unread = 0
    for line in filter(str.strip, lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            unread += 1  # cut off when the process was killed; a resumed run goes on behind it
        elif row.get("event") == "end":
            record.end = row
        elif "event" in row:
            at = number(row.get("epoch"))
            record.marks.append((at if at is not None else max(epochs, default=0.0), str(row["event"])))
        elif (at := number(row.get("epoch"))) is None:
            unread += 1
        else:
            epochs[at] = row  # a resumed run repeats the epoch it was cut off in: the later line counts
            record.end = None  # and a run that went on after its end has not ended
    record.epochs = [epochs[at] for at in sorted(epochs)]
    if unread:
        record.notes.append(f"{unread} line{'s' * (unread > 1)} of metrics.jsonl cut off or unreadable, left out")


def _read_proof(record: Record) -> None:
    """What `torch-bregman bench` has measured, if it was called."""
    try:
        record.proof = Proof.read(record.path / "proof.json")
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        record.notes.append(f"proof.json could not be read ({error})")


def read_patterns(record: Record) -> dict[str, dict[str, NDArray[np.uint8]]]:
    """{layer: {"start" | "middle" | "end": uint8 picture}}. A damaged file gives a note and an empty dictionary."""
    found: dict[str, dict[str, NDArray[np.uint8]]] = {}
    try:
        # Opened here, since numpy leaves a damaged archive open.
        with open(record.path / "patterns.npz", "rb") as raw, np.load(raw, allow_pickle=False) as file:
            for key in file:
                when, _, layer = key.partition("/")
                picture = file[key]
                if when in ("start", "middle", "end") and layer and picture.ndim == 2 and picture.dtype == np.uint8:
                    found.setdefault(layer, {})[when] = picture
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        record.notes.append(f"patterns.npz could not be read ({error})")
        return {}
    return found
