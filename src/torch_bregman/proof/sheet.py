"""The proof sheet: a sparse network beside its dense twin, as JSON and as tables.

Where the sparse network loses, the sheet says so, and where a rival could not be measured, why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from ..text import Shown, Table
from .figures import SPARSE, SPARSE_ONNX, Fact, Latency, Units
from .stored import fact_of, latency_of, number, text, units_of
from .words import EQUAL, SAME, Line, fact_line, judged, latency_line

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Proof(Shown):
    """What `prove` found; prints as tables, and `write` and `read` keep it as JSON.

    Attributes:
        measure: what `accuracy` holds, such as "test accuracy"; of a loss, a name that ends in "loss", less is better.
        accuracy: of "dense" and "sparse" as trained, and of the sparse network once it is "shrunk" and "optimized".
        density: share of the Linear and Conv weights of the sparse network that are not zero.
        difference: the largest difference between outputs of the optimized and of the trained network, relative to the
            largest output.
        facts: parameters, FLOPs, bytes, memory.
        latencies: of every contender at every batch size.
        units: outputs and inputs of the layers before and after shrinking.
        machine: what it was measured on.
        notes: what has to be known beside the figures.
    """

    measure: str
    accuracy: dict[str, float]
    density: float
    difference: float
    facts: tuple[Fact, ...]
    latencies: tuple[Latency, ...]
    units: tuple[Units, ...]
    machine: str
    notes: tuple[str, ...] = field(default=())

    # ---- as JSON

    def to_json(self) -> str:
        """The sheet as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(content: str) -> Proof:
        """The sheet that `to_json` wrote; ValueError where `content` is none."""
        try:
            raw = json.loads(content)
            return Proof(
                measure=text(raw["measure"]),
                accuracy={text(name): number(value) for name, value in raw["accuracy"].items()},
                density=number(raw["density"]),
                difference=number(raw["difference"]),
                facts=tuple(fact_of(row) for row in raw["facts"]),
                latencies=tuple(latency_of(row) for row in raw["latencies"]),
                units=tuple(units_of(row) for row in raw["units"]),
                machine=text(raw["machine"]),
                notes=tuple(map(text, raw["notes"])),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise ValueError(f"This is no proof sheet: {type(error).__name__}, {error}.") from None

    def write(self, path: str | Path) -> Path:
        """Write the sheet as JSON to `path`, whole or not at all, and return it."""
        path = Path(path)
        write_atomically(path, self.to_json().encode())
        return path

    @staticmethod
    def read(path: str | Path) -> Proof:
        """The sheet that `write` wrote. Raises OSError, or ValueError where the file is damaged."""
        return Proof.from_json(Path(path).read_text(encoding="utf-8"))

    # ---- as tables

    @property
    def comparison(self) -> tuple[tuple[str, ...], list[Line]]:
        """Heading and rows of the table of what the two networks are."""
        return ("", "dense", "sparse", ""), [*self._accuracies(), self._outputs(), *map(fact_line, self.facts)]

    @property
    def speed(self) -> tuple[tuple[str, ...], list[Line]]:
        """Heading and rows of the table of latencies."""
        return ("batch", "network", "threads", "p50 ms", "p95 ms", "sparse is"), [
            latency_line(row) for row in self.latencies
        ]

    @property
    def verdict(self) -> str:
        """In what the sparse network loses, and where it would be faster than it was here."""
        lost = [line.cells[0] for line in self.comparison[1] if line.good is False]
        slower: dict[str, list[str]] = {}  # than which contender, at which batch sizes
        for row in self.latencies:
            if row.ratio is not None and row.ratio <= 1 - EQUAL:
                slower.setdefault(row.contender, []).append(str(row.batch))
        better = slower.pop(SPARSE_ONNX, None)
        lost += [f"latency against {name} at batch {' and '.join(at)}" for name, at in slower.items()]
        said = f"The sparse network loses in {'; '.join(lost)}." if lost else "The sparse network loses nowhere here."
        if better:
            said += f" At batch {' and '.join(better)} it is faster as an ONNX file: torch-bregman export RUN."
        return said

    @property
    def explanations(self) -> list[str]:
        """What the figures mean: how each was got, where, and what else has to be known."""
        timed = (
            f"latency: {SPARSE} is what optimize_for_inference makes of the shrunk network for this batch size; all "
            "were called in turn, in random order, on the same inputs, in one process, each with one thread or all, "
            "whichever was faster; sparse is … faster: the median over the rounds of the ratio of the times of that "
            f"network and of {SPARSE}"
        )
        return [*(f"{fact.name}: {fact.how}" for fact in self.facts), timed, f"measured on {self.machine}", *self.notes]

    def _accuracies(self) -> Iterator[Line]:
        loss = self.measure.endswith("loss")
        dense, sparse = self.accuracy.get("dense"), self.accuracy.get("sparse")
        shown = {name: f"{v:.4g}" if loss else f"{100 * v:.2f} %" for name, v in self.accuracy.items()}
        if dense is not None or sparse is not None:
            said, good = ("", None) if dense is None or sparse is None else judged(sparse, dense, loss)
            yield Line((self.measure, shown.get("dense", ""), shown.get("sparse", ""), said), good)
        for name, words in (("shrunk", "after shrinking"), ("optimized", "after optimizing")):
            if name in shown:
                said = "" if sparse is None else judged(self.accuracy[name], sparse, loss, " trained")[0]
                yield Line((words, "", shown[name], said))

    def _outputs(self) -> Line:
        same = self.difference <= SAME
        said = "the same within rounding" if same else "NOT the outputs of the trained network"
        shown = f"off by {self.difference:.1g}" if self.difference else "the same"
        return Line(("outputs after that", "", shown, said if self.difference else ""), None if same else False)

    def shown(self) -> list[Table | str]:
        # The first columns and the last are words, those between them figures.
        (facts, speed) = (
            Table([head, *(line.cells for line in lines)], left={*words, len(head) - 1})
            for (head, lines), words in ((self.comparison, {0}), (self.speed, {0, 1}))
        )
        return [facts, "", speed, "", self.verdict, "", *self.explanations]

    def to_dict(self) -> dict[str, float | str]:
        made: dict[str, float | str] = {f"{self.measure}/{name}": value for name, value in self.accuracy.items()}
        made |= {"density": self.density, "difference": self.difference}
        for fact in self.facts:
            made |= {f"{fact.name}/dense": fact.dense, f"{fact.name}/sparse": fact.sparse}
        for row in self.latencies:
            if row.p50 is not None:
                made[f"ms at batch {row.batch}/{row.contender}"] = 1e3 * row.p50
        return made

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        made: list[RenderableType] = []
        for (head, lines), words in ((self.comparison, 1), (self.speed, 2)):
            drawn = Table(box=None, pad_edge=False, header_style="dim")
            for i, name in enumerate(head):
                last = i == len(head) - 1
                drawn.add_column(name, justify="left" if i < words or last else "right", no_wrap=not last)
            for line in lines:
                colour = {True: "green", False: "yellow", None: "default"}[line.good]
                drawn.add_row(*map(Text, line.cells[:-1]), Text(line.cells[-1], style=colour))
            made += [drawn, Text()]
        return Group(*made, Text(self.verdict, style="bold"), *(Text(line, style="dim") for line in self.explanations))
