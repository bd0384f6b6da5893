"""The choice of few combinations: every two values meet, and nothing else decides which rows are taken."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cases import FLOATS, covering, pairwise


def meetings(rows: list[tuple[Any, ...]], strength: int) -> set[Any]:
    return {part for row in rows for part in itertools.combinations(enumerate(row), strength)}


@pytest.mark.parametrize(
    ("sizes", "strength", "fewest", "most"),
    [((13, 8, 2), 2, 104, 104), ((9, 3, 2, 2, 2), 2, 27, 27), ((5, 4, 3, 2, 2), 2, 20, 22), ((4, 3, 2, 2), 3, 24, 28)],
    ids=str,
)
def test_all_values_meet_in_few_rows(sizes: tuple[int, ...], strength: int, fewest: int, most: int) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    chosen = covering(rows, strength)
    assert meetings(chosen, strength) == meetings(rows, strength)
    assert fewest <= len(chosen) <= most
    assert chosen == covering(rows, strength)
    for column, size in enumerate(sizes):  # and each value comes about as often as the others
        counts = [sum(row[column] == value for row in chosen) for value in range(size)]
        assert max(counts) <= 2 * min(counts), (column, counts)


def test_one_option_or_two_are_all_there() -> None:
    assert covering([(0,), (1,)]) == [(0,), (1,)]
    rows = list(itertools.product(range(3), range(4)))
    assert covering(rows) == rows
    assert covering([]) == []


def test_cases_that_do_not_exist_and_cases_that_wait() -> None:
    mark = pairwise(
        {"kind": ["a", "b", "c"], "dtype": FLOATS, "cls,flag": {"one": (1, True), "two": (2, False)}},
        where=lambda kind, flag, **_: kind != "a" or flag,
        slow=lambda dtype, **_: dtype == torch.float64,
    )
    assert mark.args[0] == ["kind", "dtype", "cls", "flag"]
    params = mark.args[1]
    assert all(p.values[0] != "a" or p.values[3] for p in params)
    for dtype, marks in ((torch.float32, []), (torch.float64, ["slow"])):
        mine = [p for p in params if p.values[1] == dtype]
        assert {(p.values[0], p.values[2]) for p in mine} == {("a", 1), ("b", 1), ("b", 2), ("c", 1), ("c", 2)}
        assert all([m.name for m in p.marks] == marks for p in mine)
    assert [p.id for p in params][:2] == ["a-float32-one", "b-float32-one"]
    assert params[0].values == ("a", torch.float32, 1, True)
