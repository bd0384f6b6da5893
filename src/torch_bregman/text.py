"""The one printer of aligned tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def table(rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The rows, heading first, in columns that are as wide as their widest cell, with two spaces between them.

    `left`: the columns of words, which begin at their left edge; all others are figures, which end at the right one.
    """
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(cells)).rstrip())
    return "\n".join(lines)
