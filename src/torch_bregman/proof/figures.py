"""The figures of a proof sheet: of both networks, of every contender, and of every layer that was shrunk."""

from __future__ import annotations

from dataclasses import dataclass

DENSE, COMPILED, ONNX = "dense, PyTorch", "dense, torch.compile", "dense, ONNX Runtime"
SPARSE, SPARSE_ONNX = "sparse, optimized", "sparse, ONNX Runtime"


@dataclass(frozen=True)
class Fact:
    """A figure of both networks of which less is better. `unit`: "", "FLOP" or "B"; `how`: what was counted."""

    name: str
    dense: float
    sparse: float
    unit: str
    how: str


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, the median and the 95th percentile, with the number of `threads` that was the faster one.

    `ratio`: its time over that of the sparse, optimized network, the median over the rounds: above 1, sparse is faster.
    `missing`: why there are no figures.
    """

    contender: str
    batch: int
    threads: int | None = None
    p50: float | None = None
    p95: float | None = None
    ratio: float | None = None
    missing: str = ""


@dataclass(frozen=True)
class Units:
    """(outputs, inputs) of a layer before and after shrinking, and why no more could go."""

    layer: str
    kind: str
    before: tuple[int, int]
    after: tuple[int, int]
    reason: str = ""
