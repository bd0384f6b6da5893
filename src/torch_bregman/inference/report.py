"""What `optimize_for_inference` chose, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..text import table


@dataclass(frozen=True)
class LayerChoice:
    """How one Linear or Conv2d computes, and the seconds that decided; None where it was not measured."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense: float | None
    sparse: float | None
    chosen: str
    why: str


@dataclass(frozen=True)
class InferenceReport:
    """What was chosen and why. `dense` and `seconds`: of the given network and of the result, for `batch` samples."""

    layers: tuple[LayerChoice, ...]
    batch: int
    threads: int
    dense: float
    seconds: float
    result: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = ("layer", "weight", "density", "dense µs", "sparse µs", "chosen", "why")
        rows = [
            (c.name, "×".join(map(str, c.shape)), f"{c.density:.1%}", _microseconds(c.dense), _microseconds(c.sparse),
             c.chosen, c.why)
            for c in self.layers
        ]  # fmt: skip
        whole = (
            f"batch {self.batch}, {self.threads} threads: dense {_microseconds(self.dense)} µs, "
            f"this {_microseconds(self.seconds)} µs"
        )
        gain = (
            f"{self.dense / self.seconds:.2f} times as fast: {self.result}"
            if self.seconds < self.dense
            else self.result
        )
        return "\n".join([table([head, *rows], left={0, 1, 5, 6}), f"{whole}, {gain}", *self.notes])


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"
