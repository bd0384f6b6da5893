"""The one printer of aligned tables, and of reports made of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from html import escape


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


@dataclass(frozen=True)
class Table:
    """The rows of `table`, for a text and for a page."""

    rows: Sequence[Sequence[str]]
    left: Collection[int] = (0,)

    def __str__(self) -> str:
        return table(self.rows, self.left)

    def html(self) -> str:
        """As a <table>."""
        lines = []
        for tag, row in zip(["th", *["td"] * (len(self.rows) - 1)], self.rows, strict=True):
            sides = ("left" if i in self.left else "right" for i in range(len(row)))
            cells = "".join(
                f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
                for side, cell in zip(sides, row, strict=True)
            )
            lines.append(f"<tr>{cells}</tr>")
        return f"<table><thead>{lines[0]}</thead><tbody>{''.join(lines[1:])}</tbody></table>"


class Shown:
    """A report: its text in a terminal, tables in a notebook, and plain values for a logger.

    A subclass says what is shown; a dataclass has to be one with `repr=False`.
    """

    def shown(self) -> Sequence[Table | str]:
        """Tables and lines from top to bottom."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, float | str]:
        """Names → numbers and words, flat as a logger takes them; those of a layer are "density/NAME" and so on."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self.shown()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(
            part.html() if isinstance(part, Table) else f"<p>{escape(part)}</p>" for part in self.shown() if part
        )
