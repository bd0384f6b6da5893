"""Recipe files: which rows a table has, how each is trained, and what was published.

A recipe file is TOML: title, task, source, [shared] options of a run, and [[rows]], each with a method (its label), its
own options and what was published.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from torch_bregman.choices import choose
from torch_bregman.train.errors import RunError
from torch_bregman.train.recipe import OPTIMIZERS, Recipe

from .variance import VARIANCE_OPTIONS, variance_settings

EXPERIMENTS = Path(__file__).parents[1]  # of the clone: recipes, results and this package
QUICK: dict[str, Any] = {"epochs": 1, "limit": 1000}
QUICK_WARNING = "--quick: few samples, one epoch, one seed. These figures prove that the path works, and mean nothing."
KINDS = ("train", "variance")
OPTIONS = tuple(f.name for f in fields(Recipe) if f.name != "seed")
PUBLISHED = ("accuracy", "ssim", "density", "note", "source")
PICTURES = ("curves", "architecture")


@dataclass(frozen=True)
class Row:
    """A line of a table: how it is made, and what was published. All but texts are fractions."""

    method: str
    options: dict[str, Any]
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def unknown(self) -> str | None:
        """The optimizer, where this version has none of that name."""
        name = self.options.get("optimizer", "adabreg")
        return None if name in OPTIMIZERS else str(name)


@dataclass(frozen=True)
class Experiment:
    """A recipe file, read and checked."""

    name: str
    title: str
    task: str
    source: str
    kind: str
    picture: str
    rows: tuple[Row, ...]
    shared: dict[str, Any]
    quick: dict[str, Any]

    def missing_device(self) -> str | None:
        """The kind of device that the rows need and this machine lacks."""
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        needed = {str(row.options.get("device", "auto")).partition(":")[0] for row in self.rows}
        return next((device for device in sorted(needed) if not there.get(device, True)), None)


def read_experiment(path: Path) -> Experiment:
    """The recipe file `path`.

    Raises RunError, naming the file and the row, for what is no TOML, an unknown key or option, or a bad value. An
    optimizer that this version does not know is no error: its rows are skipped when they are run.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"Cannot read the recipe {path}: {error}.") from None
    where = f"The recipe {path}"
    try:
        for key in content:
            choose("key", key, ("title", "task", "source", "kind", "picture", "shared", "quick", "rows"))
        for key in ("title", "task", "source"):
            if not isinstance(content.get(key), str):
                raise ValueError(f"Invalid `{key}`: {content.get(key)!r}; expected a text.")
        kind = choose("kind", content.get("kind", "train"), KINDS)
        picture = choose("picture", content.get("picture", "curves"), PICTURES)
        known = OPTIONS if kind == "train" else VARIANCE_OPTIONS
        shared, quick, tables = content.get("shared", {}), content.get("quick", {}), content.get("rows")
        for name, table in (("shared", shared), ("quick", quick)):
            if not isinstance(table, dict):
                raise ValueError(f"Invalid `{name}`: {table!r}; expected a table.")
            for option in table:
                choose("option", option, known)
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise ValueError("There are no [[rows]] in it.")
        rows: list[Row] = []
        for table in tables:
            method = table.get("method")
            where = f"The recipe {path}, row {method!r}"
            if not isinstance(method, str) or method in (row.method for row in rows):
                raise ValueError(f"Invalid `method`: {method!r}; expected a text that no other row has.")
            rows.append(_read_row(table, kind, known, shared, quick))
    except (ValueError, TypeError) as error:
        raise RunError(f"{where}: {error}") from None
    return Experiment(
        path.stem, content["title"], content["task"], content["source"], kind, picture, tuple(rows), shared,
        (QUICK if kind == "train" else {}) | quick,
    )  # fmt: skip


def _read_row(
    table: dict[str, Any], kind: str, known: Sequence[str], shared: dict[str, Any], quick: dict[str, Any]
) -> Row:
    published = table.get("published", {})
    if not isinstance(published, dict):
        raise ValueError(f"Invalid `published`: {published!r}; expected a table.")
    for key, value in published.items():
        choose("published", key, PUBLISHED)
        good = isinstance(value, str) if key in ("note", "source") else type(value) in (int, float) and 0 <= value <= 1
        if not good:
            raise ValueError(f"Invalid `published.{key}`: {value!r}; fractions in [0, 1] and texts are expected.")
    own = {key: value for key, value in table.items() if key not in ("method", "published")}
    for option in own:
        choose("option", option, known)
    defaults = {f.name: f.default for f in fields(Recipe)}
    for option, value in (shared | own | quick).items():
        kind_of = type(defaults.get(option))
        if kind_of in (str, bool) and type(value) is not kind_of:
            raise ValueError(
                f"Invalid `{option}`: {value!r}; expected a {'text' if kind_of is str else 'true or false'}."
            )
    row = Row(table["method"], shared | own, published)
    if kind == "variance":
        variance_settings(row.options | quick)
    elif row.unknown is None:
        Recipe(**row.options).check()
        Recipe(**(row.options | QUICK | quick)).check()
    return row


def find_recipes(folder: Path | None) -> Path:
    """`folder`, or the one of this clone; RunError where there is none."""
    if folder is None:
        return EXPERIMENTS / "recipes"
    if not folder.is_dir():
        raise RunError(f"There is no folder {folder}; --recipes names the one with the recipe files (*.toml).")
    return folder


def read_experiments(folder: Path) -> dict[str, Experiment]:
    """All recipe files of `folder`, by name."""
    found = {path.stem: read_experiment(path) for path in sorted(folder.glob("*.toml"))}
    if not found:
        raise RunError(f"There are no recipe files (*.toml) in {folder}.")
    return found
