"""How figures are put into words, and which of two is the better one."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .figures import SPARSE, SPARSE_ONNX, Fact, Latency

EQUAL = 0.05  # two figures that differ by less are about equal
SAME = 1e-4  # outputs that differ by less, of the largest one, are the same within rounding


@dataclass(frozen=True)
class Line:
    """A row of a table. `good`: whether the sparse network wins in it, None where neither does."""

    cells: tuple[str, ...]
    good: bool | None = None


def judged(value: float, other: float, loss: bool, than: str = "") -> tuple[str, bool | None]:
    """How `value` compares with `other`, and whether it is the better one."""
    if loss:
        if abs(value - other) <= SAME * abs(other):
            return f"the same{than and ' as' + than}", None
        return f"{abs(value / other - 1):.1%} {'lower' if value < other else 'higher'}{than and ' than' + than}", (
            value < other
        )
    points = round(100 * (value - other), 2)
    if points == 0:
        return f"the same{than and ' as' + than}", None
    return f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}{than and ' than' + than}", points > 0


def fact_line(fact: Fact) -> Line:
    said, good = _compared(fact.dense, fact.sparse, "less", "more")
    return Line((fact.name, _amount(fact.dense, fact.unit), _amount(fact.sparse, fact.unit), said), good)


def _compared(dense: float, sparse: float, better: str, worse: str) -> tuple[str, bool | None]:
    """ "3.2 × less", and whether that is good; None within `EQUAL`."""
    if dense <= 0 or sparse <= 0:
        return "", None if dense == sparse else sparse < dense
    ratio = dense / sparse
    if 1 - EQUAL < ratio < 1 / (1 - EQUAL):
        return "about equal", None
    return (f"{_short(ratio)} × {better}", True) if ratio > 1 else (f"{_short(1 / ratio)} × {worse}", False)


def latency_line(row: Latency) -> Line:
    batch = str(row.batch)
    if row.p50 is None or row.p95 is None or row.ratio is None:
        return Line((batch, row.contender, "", "—", "—", f"not measured: {row.missing}"))
    threads = "" if row.threads is None else str(row.threads)
    p50, p95 = _milliseconds(row.p50), _milliseconds(row.p95)
    if row.contender == SPARSE:
        return Line((batch, row.contender, threads, p50, p95, ""))
    said, good = _compared(row.ratio, 1.0, "faster", "slower")
    return Line((batch, row.contender, threads, p50, p95, said), None if row.contender == SPARSE_ONNX else good)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3f}" if seconds < 0.1 else f"{1e3 * seconds:,.1f}"


def _amount(value: float, unit: str) -> str:
    """ "8,680", "34.7 kB", "1.25 MFLOP"."""
    if not unit:
        return f"{value:,.0f}"
    if value < 1000:
        return f"{value:,.0f} {unit}"
    power = min(int(math.log10(value)) // 3, 5)
    return f"{value / 1000.0**power:.3g} {' kMGTP'[power]}{unit}"
