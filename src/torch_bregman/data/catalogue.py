"""`load`: from a name or a path to a `Dataset`."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch_bregman.data import arrays, cifar, digits, folder, idx
from torch_bregman.data.dataset import Dataset
from torch_bregman.data.errors import DataError
from torch_bregman.data.splits import Raw, assemble

READERS: dict[str, Callable[[Path | None, Path | None], Raw]] = {
    "digits": lambda root, cache: digits.read(),
    "mnist": partial(idx.read, "mnist"),
    "fashion-mnist": partial(idx.read, "fashion-mnist"),
    "cifar10": cifar.read,
}


def names() -> tuple[str, ...]:
    """The data sets that `load` knows by name."""
    return tuple(READERS)


def load(
    name: str,
    root: str | Path | None = None,
    *,
    cache: Path | None = None,
    validation: float | int | None = None,
    limit: int | None = None,
) -> Dataset:
    """The data set `name`, in memory, normalised, split in three.

    `name`: one of `names()`, or the path of a `.npz` file or of an image folder (./mnist is a folder, mnist is MNIST),
    or "package.module:function", which returns a dict of arrays as such a file holds them.
    `root`: a folder that holds the files already, one folder per data set; nothing is downloaded then. None: they are
    downloaded once, from their homes or from TORCH_BREGMAN_DATA_URL, and checked against known md5s.
    `cache`: where downloads and decoded files are kept; None: the user's cache folder.
    `validation`: what to hold out of the training data, as a fraction of it or as a count; 0 leaves the split empty.
    None: 5000 for mnist, fashion-mnist and cifar10, a tenth elsewhere. Stratified, and the same every time.
    `limit`: keep only the first so many training samples (after the split; mean and std are still those of all).

    The training samples come in a fixed shuffled order. Raises `DataError` for whatever is wrong.
    """
    name = os.fspath(name)  # a Path is welcome, too
    root = None if root is None else Path(root).expanduser()
    if root is not None and not root.is_dir():
        raise DataError(
            f"`root`: got {root}, which is no folder; expected one that holds a folder per data set (--data-root)."
        )
    if name in READERS:
        return assemble(READERS[name](root, cache), validation, limit)
    path = Path(name).expanduser()
    if path.is_dir():
        return assemble(folder.read(path), validation, limit)
    if path.suffix.lower() == ".npz":
        return assemble(arrays.read(path), validation, limit)
    if ":" in name and not path.exists() and all(part.isidentifier() for part in re.split(r"[.:]", name)):
        return assemble(arrays.call(name), validation, limit)
    known = (
        f"expected one of {', '.join(READERS)}, the path of a .npz file or an image folder, or package.module:function."
    )
    if path.is_file() or os.sep in name or "/" in name:
        found = "a file of another kind" if path.is_file() else "which does not exist"
        raise DataError(f"`name`: got {name}, {found}; {known}")
    near = difflib.get_close_matches(name.lower(), READERS, 1, 0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise DataError(f"`name`: got {name!r}{hint}; {known}")
