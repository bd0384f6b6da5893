"""What `optimize_for_inference` chose, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ..text import Shown, Table


@dataclass(frozen=True)
class LayerChoice:
    """How one layer with a weight computes, and the seconds that decided; None where it was not measured."""

    name: str
    shape: tuple[int, ...]
    density: float
    dense: float | None
    sparse: float | None
    chosen: str
    why: str


@dataclass(frozen=True, repr=False)
class InferenceReport(Shown):
    """What was chosen and why. `dense` and `seconds`: of the given network and of the result, for `batch` samples."""

    layers: tuple[LayerChoice, ...]
    batch: int
    threads: int
    dense: float
    seconds: float
    result: str
    notes: tuple[str, ...] = ()

    def shown(self) -> list[Table | str]:
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
        return [Table([head, *rows], left={0, 1, 5, 6}), f"{whole}, {gain}", *self.notes]

    def to_dict(self) -> dict[str, float | str]:
        made: dict[str, float | str] = {
            "batch": self.batch, "threads": self.threads, "dense_ms": 1e3 * self.dense, "ms": 1e3 * self.seconds,
            "result": self.result,
        }  # fmt: skip
        for layer in self.layers:
            made[f"chosen/{layer.name}"], made[f"density/{layer.name}"] = layer.chosen, layer.density
            times = {"dense_ms": layer.dense, "sparse_ms": layer.sparse}
            made |= {f"{name}/{layer.name}": 1e3 * time for name, time in times.items() if time is not None}
        return made


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}" if seconds > 1e-4 else f"{seconds * 1e6:.1f}"
