"""A proof sheet as JSON holds texts, numbers and pairs; what else is found there is a TypeError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figures import Fact, Latency, Units


def fact_of(row: Any) -> Fact:
    return Fact(text(row["name"]), number(row["dense"]), number(row["sparse"]), text(row["unit"]), text(row["how"]))


def latency_of(row: Any) -> Latency:
    threads = None if row["threads"] is None else int(number(row["threads"]))
    p50, p95, ratio = (None if row[key] is None else number(row[key]) for key in ("p50", "p95", "ratio"))
    return Latency(text(row["contender"]), int(number(row["batch"])), threads, p50, p95, ratio, text(row["missing"]))


def units_of(row: Any) -> Units:
    return Units(text(row["layer"]), text(row["kind"]), pair(row["before"]), pair(row["after"]), text(row["reason"]))


def text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return "".join(c if c.isprintable() else " " for c in value)[:1000]


def number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{type(value).__name__} in place of a number")
    return value


def pair(value: Sequence[int]) -> tuple[int, int]:
    first, second = value
    return int(number(first)), int(number(second))
