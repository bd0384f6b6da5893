"""How the layers computed in the last coarse phase."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..text import Shown, Table
from .choice import Choice


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """Per layer, and for the whole network, what was chosen and the seconds of a training pass both ways.

    `notes`: sentences on what keeps layers from computing with their live weights alone.
    """

    choices: dict[str, Choice]
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """As plain values: layer, computes, density, dense_ms, sparse_ms."""
        return [
            {
                "layer": name, "computes": choice.kind, "density": choice.density,
                "dense_ms": 1e3 * choice.dense, "sparse_ms": 1e3 * choice.sparse,
            }
            for name, choice in self.choices.items()
        ]  # fmt: skip

    def shown(self) -> list[Table | str]:
        lines = [["layer", "computes", "density", "dense ms", "sparse ms", "faster"]]
        for name, choice in self.choices.items():
            times = [f"{1e3 * choice.dense:.3f}", f"{1e3 * choice.sparse:.3f}", f"{choice.dense / choice.sparse:.1f} x"]
            lines.append([name, choice.kind, f"{choice.density:.3%}", *times])
        return [Table(lines, left=(0, 1)), *self.notes]

    def to_dict(self) -> dict[str, float | str]:
        return {f"{key}/{row['layer']}": row[key] for row in self.rows() for key in row if key != "layer"}
