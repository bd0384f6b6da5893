"""What users call the splits and the arrays of their own data."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

SPLITS = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
AXES = {
    **dict.fromkeys(("x", "image", "images", "data", "features", "inputs"), "x"),
    **dict.fromkeys(("y", "label", "labels", "target", "targets"), "y"),
}
UNSURE = {"eval", "evaluation", "holdout", "heldout", "held", "unlabeled", "unlabelled", "extra", "final"}
WANTED = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")


def split_of(name: str) -> str | None:
    """train, val or test, where `name` is a word for it."""
    return SPLITS.get(name.lower())


def array_of(name: str) -> str | None:
    """The array that `name` certainly is, such as x, y_train, x_val: X_valid is x_val, train_labels y_train."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    axes, splits = ([kinds[word] for word in words if word in kinds] for kinds in (AXES, SPLITS))
    if len(axes) != 1 or len(axes) + len(splits) != len(words) or len(splits) > 1:
        return None
    return "_".join([*axes, *splits])


def uncertain(name: str) -> bool:
    """Whether `name` looks like samples or labels, but not certainly like which."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return bool(words & AXES.keys() and words & UNSURE) or nearest(name, WANTED) is not None


def nearest(name: str, others: Iterable[str]) -> str | None:
    """The one of `others` that `name` may be a slip of, whatever the case."""
    by_lower = {other.lower(): other for other in others}
    found = difflib.get_close_matches(name.lower(), by_lower, 1, 0.82)  # x_var is no x_val
    return by_lower[found[0]] if found else None
