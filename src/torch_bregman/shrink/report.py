"""What became of each layer: the report of `shrink`."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..text import Shown, Table


@dataclass(frozen=True)
class Row:
    """What became of one layer.

    Attributes:
        name, kind: of the layer in the network that was given.
        before, after: (outputs, inputs) of a layer, (heads, width) of an attention, (columns, rows) of an embedding.
        parameters: before and after.
        kept: dead units that had to stay.
        reason: why they, or the layer as it is, had to stay.
        rank: of two factors that took its place.
    """

    name: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int]
    parameters: tuple[int, int]
    kept: int = 0
    reason: str = ""
    rank: int | None = None


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """What `shrink` did, layer by layer; prints as a table.

    Attributes:
        rows: one per layer, in the order of the network.
        parameters: of the whole network, before and after.
        difference: the largest difference of the outputs, relative to the largest output, in float64.
        notes: what else there is to know.
    """

    rows: list[Row]
    parameters: tuple[int, int]
    difference: float
    notes: list[str] = field(default_factory=list)

    def shown(self) -> list[Table | str]:
        lines: list[tuple[str, ...]] = [("layer", "units", "inputs", "parameters", "")]
        for row in self.rows:
            remark = f"rank {row.rank}: two factors" if row.rank else ""
            if row.reason:
                remark += f"{'; ' if remark else ''}{f'{row.kept} dead stay: ' if row.kept else ''}{row.reason}"
            sizes = (f"{a:,} → {b:,}" if a != b else f"{a:,}" for a, b in zip(row.before, row.after, strict=True))
            lines.append((f"{row.name} ({row.kind})", *sizes, "{:,} → {:,}".format(*row.parameters), remark))
        before, after = self.parameters
        whole = (
            f"{before:,} → {after:,} parameters ({after / max(before, 1):.1%}), outputs within {self.difference:.1e}"
        )
        return [Table(lines, left={0, 4}), whole, *self.notes]

    def to_dict(self) -> dict[str, float | str]:
        before, after = self.parameters
        made: dict[str, float | str] = {"parameters": after, "dense_parameters": before, "difference": self.difference}
        for row in self.rows:
            made[f"parameters/{row.name}"] = row.parameters[1]
            made[f"outputs/{row.name}"], made[f"inputs/{row.name}"] = row.after
        return made
