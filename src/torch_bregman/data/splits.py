"""From raw arrays to a `Dataset`: what is not given is held out, class by class, the same way every time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from torch_bregman.data.dataset import Dataset, Split
from torch_bregman.data.errors import DataError
from torch_bregman.data.normalise import Array, normalise, statistics

TEST_FRACTION = 0.2
TEST_SEED, VALIDATION_SEED, ORDER_SEED = 1, 2, 3  # fixed: a split never depends on the seed of a run

Pair = tuple[Array, Array]


@dataclass(frozen=True, eq=False)
class Raw:
    """What a reader of a format returns: pairs (x, y), x uint8 or float [N, C, H, W] or [N, F], y integer [N].

    A `validation` or `test` that is None is held out of `train`: `held_out` for validation, a fifth for test.
    """

    name: str
    train: Pair
    classes: tuple[str, ...]
    validation: Pair | None = None
    test: Pair | None = None
    held_out: float | int = 0.1
    note: str = ""


def hold_out(y: Array, count: int, seed: int) -> tuple[Array, Array]:
    """Positions (kept, held), both ascending: `count` of the samples with labels `y`, in their classes' proportions.

    Every class keeps one sample, so where classes are tiny fewer than `count` are held.
    """
    _, kind, sizes = np.unique(y, return_inverse=True, return_counts=True)
    room = sizes - 1
    ideal = sizes * (count / max(1, len(y)))
    take = np.minimum(np.floor(ideal).astype(np.int64), room)
    while (left := min(count, int(room.sum())) - int(take.sum())) > 0:  # the largest remainders come first
        order = np.argsort(take - ideal, kind="stable")
        take[order[take[order] < room[order]][:left]] += 1
    # RandomState, because NumPy promises never to change its stream; Generator's may change with a release.
    random = np.random.RandomState(seed)
    held = np.zeros(len(y), dtype=bool)
    for k, number in enumerate(take):
        held[random.permutation(np.flatnonzero(kind == k))[:number]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def held_count(size: float | int, total: int) -> int:
    """`size` as a number of samples: a float is a fraction of `total`, an int a count."""
    number = isinstance(size, (int, float)) and not isinstance(size, bool)
    if not number or not 0 <= size < (1 if isinstance(size, float) else total):
        raise DataError(
            f"`validation`: got {size!r}; expected a fraction in [0, 1) or a count below the {total:,} samples."
        )
    return size if isinstance(size, int) else max(round(size * total), int(size > 0))


def assemble(raw: Raw, validation: float | int | None, limit: int | None) -> Dataset:
    """Split, normalise and limit `raw`. A fraction `validation` counts of all samples in `raw.train`."""
    x, y = raw.train
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"`limit`: got {limit!r}; expected a positive number of training samples, or None for all.")
    if validation is not None and raw.validation is not None:
        raise DataError(
            f"`validation`: got {validation!r}, but {raw.name} brings its own validation split; expected None."
        )
    train = np.arange(len(y))
    held: dict[str, tuple[Pair, Array]] = {}
    if raw.test is None:
        train, index = hold_out(y, held_count(TEST_FRACTION, len(y)), TEST_SEED)
        held["test"] = raw.train, index
    else:
        held["test"] = raw.test, np.arange(len(raw.test[1]))
    if raw.validation is None:
        size = raw.held_out if validation is None else validation
        kept, index = hold_out(y[train], held_count(size, len(y)), VALIDATION_SEED)
        held["validation"] = raw.train, train[index]
        train = train[kept]
    else:
        size = 1
        held["validation"] = raw.validation, np.arange(len(raw.validation[1]))
    for part, (_, index) in held.items():
        if not len(index) and (part == "test" or size):
            raise DataError(
                f"{raw.name}: {len(y)} samples in {len(raw.classes)} classes leave none for the {part} split; "
                "expected at least three samples of one class."
            )

    # A fixed shuffled order, so that the first `limit` samples hold all classes even where files are sorted by class.
    train = np.random.RandomState(ORDER_SEED).permutation(train)
    mean, std = statistics(x, train)  # of the whole training split: `limit` changes no sample

    def split(pair: Pair, index: Array) -> Split:
        return Split(normalise(pair[0], index, mean, std), torch.from_numpy(pair[1][index].astype(np.int64)))

    return Dataset(
        name=raw.name,
        train=split(raw.train, train[:limit]),
        validation=split(*held["validation"]),
        test=split(*held["test"]),
        classes=raw.classes,
        shape=tuple(x.shape[1:]),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        note=raw.note,
    )
