"""The user's own arrays: x_train, y_train and, if wanted, x_val, y_val, x_test, y_test; or x, y.

They stand in a `.npz`, or a function of the user's own returns them.
"""

from __future__ import annotations

import difflib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from torch_bregman.choices import imported
from torch_bregman.data.errors import DataError
from torch_bregman.data.normalise import Array, pieces
from torch_bregman.data.splits import Pair, Raw

CHANNELS = (1, 2, 3, 4)  # axis lengths that are taken for channels


def read(path: Path) -> Raw:
    """The arrays in `path`.

    x: uint8 or float, [N, F], [N, H, W], [N, C, H, W] or [N, H, W, C]; the last only where C is 1 to 4 and the second
    axis is not. y: integers [N]; the classes are the labels that occur, in ascending order. No pickle is ever read.
    """
    return check(path, path.stem, read_arrays(path))


def call(name: str) -> Raw:
    """The arrays that the function "package.module:function" returns by name; the rules are those of `read`."""
    try:
        made = imported("dataset", name)()
    except ValueError as error:
        raise DataError(str(error)) from None
    if not isinstance(made, Mapping):
        raise DataError(f"{name}: returned {type(made).__name__}; expected a dict of arrays, x_train, y_train, ….")
    return check(name, name.rpartition(":")[2], {key: np.asarray(array) for key, array in made.items()})


def check(path: Path | str, title: str, arrays: dict[str, Array]) -> Raw:
    """The data set in `arrays`, which come from `path`."""
    names = ("x", "y") if "x" in arrays and "x_train" not in arrays else ("x_train", "y_train")
    train = read_pair(path, arrays, *names)
    if train is None:
        found = ", ".join(arrays) or "nothing"
        near = difflib.get_close_matches("x_train", list(arrays), 1)
        hint = f" ({near[0]} for x_train?)" if near else ""
        raise DataError(f"{path}: holds {found}{hint}; expected x_train and y_train, or x and y.")
    pairs = {"train": train}
    for kind in ("val", "test"):
        pair = read_pair(path, arrays, f"x_{kind}", f"y_{kind}")
        if pair is None:
            continue
        same = pair[0].shape[1:] == train[0].shape[1:]
        if not same or (pair[0].dtype == np.uint8) != (train[0].dtype == np.uint8):
            raise DataError(
                f"{path}: x_{kind} has {describe(pair[0])}; expected the same as {names[0]}, {describe(train[0])}."
            )
        pairs[kind] = pair
    labels = np.unique(np.concatenate([y for _, y in pairs.values()]))
    if len(labels) < 2:
        raise DataError(f"{path}: {names[1]} holds only the label {labels[0]}; expected at least two classes.")
    pairs = {kind: (x, np.searchsorted(labels, y)) for kind, (x, y) in pairs.items()}
    classes = tuple(map(str, labels.tolist()))
    return Raw(title, pairs["train"], classes, validation=pairs.get("val"), test=pairs.get("test"))


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays in `path` that have a meaning here."""
    wanted = {f"{axis}{kind}" for axis in "xy" for kind in ("", "_train", "_val", "_test")}
    key = ""
    try:
        with open(path, "rb") as stream, zipfile.ZipFile(stream):  # refuses at once what is no zip
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                arrays = {}
                for key in file.files:
                    arrays[key] = file[key] if key in wanted else np.empty(0)
                return arrays
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        where = f"{path}: {key}" if key else str(path)
        raise DataError(
            f"{where}: not readable ({error}); expected a .npz of plain number arrays, as numpy.savez writes."
        ) from error


def read_pair(path: Path | str, arrays: dict[str, Array], x_name: str, y_name: str) -> Pair | None:
    """The checked arrays `x_name`, as [N, F] or [N, C, H, W], and `y_name`; None where neither is there."""
    if x_name not in arrays and y_name not in arrays:
        return None
    for name in (x_name, y_name):
        if name not in arrays:
            raise DataError(f"{path}: lacks {name}; expected {x_name} and {y_name} together.")
    x, y = arrays[x_name], arrays[y_name]
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise DataError(f"{path}: {x_name} has {describe(x)}; expected uint8 or float.")
    if not 2 <= x.ndim <= 4 or x.size == 0:
        raise DataError(
            f"{path}: {x_name} has {describe(x)}; expected [N, F], [N, H, W], [N, H, W, C] or [N, C, H, W], not empty."
        )
    if y.dtype.kind not in "iu" or y.ndim != 1:
        raise DataError(f"{path}: {y_name} has {describe(y)}; expected integers [N].")
    if len(x) != len(y):
        raise DataError(f"{path}: {y_name} has {len(y)} labels; expected {len(x)}, one for each sample of {x_name}.")
    if y.min() < 0:
        raise DataError(f"{path}: {y_name} holds the label {y.min()}; expected 0 or more.")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in CHANNELS and x.shape[1] not in CHANNELS:
        x = np.moveaxis(x, 3, 1)
    for place, piece in pieces(x, np.arange(len(x))):
        bad = ~(np.abs(piece) <= np.finfo(np.float32).max)  # also true for NaN
        if bad.any():
            sample = np.argwhere(bad)[0]
            value, row = piece[tuple(sample)], place.start + sample[0]
            raise DataError(f"{path}: {x_name}[{row}] holds {value}; expected finite float32 numbers.")
    return x, y


def describe(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"
