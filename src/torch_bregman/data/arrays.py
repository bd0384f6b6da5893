"""The user's own arrays: x_train, y_train and, if wanted, x_val, y_val, x_test, y_test; or x, y.

They stand in a `.npz`, or a function of the user's own returns them.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torch_bregman.choices import called
from torch_bregman.data.errors import DataError
from torch_bregman.data.layouts import CHANNELS, as_images, family, place_of_channels
from torch_bregman.data.normalise import Array, pieces
from torch_bregman.data.splits import Pair, Raw
from torch_bregman.data.words import WANTED, array_of, nearest, uncertain


def read(path: Path) -> Raw:
    """The arrays in `path`, under names that `words.array_of` knows.

    x: numbers, [N, F], [N, H, W], [N, C, H, W] or [N, H, W, C], see `layouts`. y: integers [N]; the classes are the
    labels that occur, in ascending order. No pickle is ever read.
    """
    return check(path, path.stem, read_arrays(path))


def call(name: str) -> Raw:
    """The arrays that the function "package.module:function" returns by name; the rules are those of `read`."""
    try:
        made = called("dataset", name)
    except ValueError as error:
        raise DataError(str(error)) from None
    if not isinstance(made, Mapping):
        raise DataError(f"{name}: returned {type(made).__name__}; expected a dict of arrays, x_train, y_train, ….")
    arrays = {}
    for key, value in made.items():
        try:
            arrays[str(key)] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors of a GPU or of a graph
            raise DataError(f"{name}: {key} is {type(value).__name__}, which makes no array ({error}).") from None
    return check(name, name.rpartition(":")[2], arrays)


def check(path: Path | str, title: str, arrays: dict[str, Array]) -> Raw:
    """The data set in `arrays`, which come from `path`."""
    called = names_of(path, arrays)
    own = ("x", "y") if "x" in called and "x_train" not in called else ("x_train", "y_train")
    wanted = {"train": own, "val": ("x_val", "y_val"), "test": ("x_test", "y_test")}
    found = {kind: read_pair(path, arrays, called, *names) for kind, names in wanted.items()}
    pairs = {kind: pair for kind, pair in found.items() if pair is not None}
    if "train" not in pairs:
        near = nearest("x_train", arrays)
        hint = f" ({near} for x_train?)" if near else ""
        raise DataError(
            f"{path}: holds {', '.join(arrays) or 'nothing'}{hint}; expected x_train and y_train, or x and y."
        )
    x_name, y_name = (called[name] for name in own)
    if unknown := [name for name in arrays if array_of(name) is None and uncertain(name)]:
        near = nearest(unknown[0], WANTED)
        raise DataError(
            f"{path}: holds {', '.join(unknown)}{f' ({near}?)' if near else ''} beside {x_name}; expected x_val, "
            "y_val, x_test and y_test, or another name for what is not to be read."
        )
    x, y = pairs["train"]
    labels = np.unique(y)
    if len(labels) < 2:
        raise DataError(f"{path}: {y_name} holds only the label {labels[0]}; expected at least two classes.")
    for kind, (other, own_labels) in pairs.items():
        if other.shape[1:] != x.shape[1:] or family(other) != family(x):
            name = called[wanted[kind][0]]
            raise DataError(f"{path}: {name} has {describe(other)}; expected the same as {x_name}, {describe(x)}.")
        if len(strange := np.setdiff1d(own_labels, labels)):
            raise DataError(
                f"{path}: {called[wanted[kind][1]]} holds the label {strange[0]}; expected those of {y_name}, "
                f"{labels[0]} to {labels[-1]}."
            )
    place, note = place_of_channels(f"{path}: {x_name}", x, arrays.get(CHANNELS))
    images = as_images([x for x, _ in pairs.values()], place)
    pairs = {kind: (x, np.searchsorted(labels, y)) for (kind, (_, y)), x in zip(pairs.items(), images, strict=True)}
    used = {called[name] for kind in pairs for name in wanted[kind]} | {CHANNELS}
    left = ", ".join(name for name in arrays if name not in used)
    notes = [note] if note else []
    notes += [f"not read from {title}: {left}"] if left else []
    return Raw(
        title, pairs["train"], tuple(map(str, labels.tolist())), validation=pairs.get("val"), test=pairs.get("test"),
        note="; ".join(notes),
    )  # fmt: skip


def names_of(path: Path | str, arrays: Mapping[str, object]) -> dict[str, str]:
    """x, y_train, … → the name under which it stands in `arrays`."""
    called: dict[str, str] = {}
    for name in arrays:
        known = array_of(name)
        if known is not None and called.setdefault(known, name) != name:
            raise DataError(f"{path}: holds {called[known]} and {name}; expected one of them, as {known}.")
    return called


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays in `path`; those that have no meaning here are left empty."""
    key = ""
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream):  # refuses at once what is no zip
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                arrays = {}
                for key in file.files:
                    arrays[key] = file[key] if array_of(key) or key == CHANNELS else np.empty(0)
                return arrays
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        where = f"{path}: {key}" if key else str(path)
        raise DataError(
            f"{where}: not readable ({error}); expected a .npz of plain number arrays, as numpy.savez writes."
        ) from error


def read_pair(
    path: Path | str, arrays: dict[str, Array], called: dict[str, str], x_name: str, y_name: str
) -> Pair | None:
    """The checked arrays `x_name` and `y_name`; None where neither is there."""
    if x_name not in called and y_name not in called:
        return None
    for name, other in ((x_name, y_name), (y_name, x_name)):
        if name not in called:
            raise DataError(f"{path}: lacks {name}; expected it beside {called[other]}.")
    x_name, y_name = called[x_name], called[y_name]
    x, y = arrays[x_name], arrays[y_name]
    if x.dtype.kind not in "fiub":
        raise DataError(f"{path}: {x_name} has {describe(x)}; expected whole or floating point numbers.")
    if not 2 <= x.ndim <= 4 or x.size == 0:
        raise DataError(
            f"{path}: {x_name} has {describe(x)}; expected [N, F], [N, H, W], [N, H, W, C] or [N, C, H, W], not empty."
        )
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.dtype.kind not in "iub" or y.ndim != 1:
        whole = y.dtype.kind == "f" and y.ndim == 1 and bool((y == np.floor(y)).all())
        hint = f"; write {y_name}.astype(int)" if whole else ""
        raise DataError(f"{path}: {y_name} has {describe(y)}; expected integers [N]{hint}.")
    if len(x) != len(y):
        raise DataError(f"{path}: {y_name} has {len(y)} labels; expected {len(x)}, one for each sample of {x_name}.")
    y = y.astype(int) if y.dtype == bool else y
    if y.min() < 0:
        raise DataError(f"{path}: {y_name} holds the label {y.min()}; expected 0 or more.")
    for place, piece in pieces(x, np.arange(len(x))):
        bad = ~(np.abs(piece) <= np.finfo(np.float32).max)  # also true for NaN
        if bad.any():
            sample = np.argwhere(bad)[0]
            value, row = piece[tuple(sample)], place.start + sample[0]
            raise DataError(f"{path}: {x_name}[{row}] holds {value}; expected finite float32 numbers.")
    return x, y


def describe(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
