"""The tables of docs/scaling.md: what was counted on few processes beside the formula, and the formula for many GPUs.

    python benchmarks/scaling.py

Reads benchmarks/results/communication.json (see communication.py), measures nothing, prints Markdown.

    P parameters, N ranks, b bytes of a weight and of its gradient, k float32 tensors of state (SGD with momentum 1,
    Adam 2, LinBreg 1, AdaBreg 3), d density, m margin, c coarse steps to a fine one

    sent by a rank in a step      ring all-reduce of the gradients, 2(N − 1)/N · bP; under FSDP two all-gathers of the
                                  weights and a reduce-scatter of the gradients, 3(N − 1)/N · bP
    multilevel                    that times d(1 + m) in a coarse step, and times (1 + c·d(1 + m))/(1 + c) on average
    memory of a rank              P·(2b + 4k), and 4P for the float32 copy of bfloat16 weights that SGD and Adam need;
                                  under FSDP the N-th part of it
    multilevel, coarse step       d(1 + m)P·(2b + 4k + i) on top, of which i is an index. Nothing of the full space is
                                  given back: not the state, which waits, and not DDP's buckets
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COUNTED = Path(__file__).parent / "results" / "communication.json"
SIZES = {"1 B": 1e9, "10 B": 1e10, "100 B": 1e11}
RANKS = [8, 64, 512, 4096]
DENSITIES = [0.05, 0.02, 0.01]
BANDWIDTH = 50e9  # bytes a second that a GPU sends, all in all: an assumption
MARGIN, COARSE = 1.0, 9  # the defaults of tb.Multilevel, where the end of the run is not known
INDEX = 16  # bytes of an entry: int64, twice with a margin; what sparse layers on a CPU need comes on top
STATE = {"SGD": 1, "Adam": 2, "LinBreg": 1, "AdaBreg": 3}


def reduced(parameters: float, each: int, ranks: int) -> float:
    """Bytes that a rank sends in a ring all-reduce."""
    return 2 * (ranks - 1) / ranks * each * parameters


def sharded(parameters: float, each: int, ranks: int) -> float:
    """Bytes that a rank sends in a step under FSDP."""
    return 3 * (ranks - 1) / ranks * each * parameters


def live(density: float, margin: float = MARGIN) -> float:
    """The share of the entries that a coarse step trains."""
    return density * (1 + margin)


def cycle(density: float, margin: float = MARGIN, coarse: int = COARSE) -> float:
    """The mean share of the entries whose gradients are sent."""
    return (1 + coarse * live(density, margin)) / (1 + coarse)


def memory(parameters: float, each: int, method: str) -> float:
    """Bytes of weights, gradients and state."""
    copy = 4 if each < 4 and method in ("SGD", "Adam") else 0
    return parameters * (2 * each + 4 * STATE[method] + copy)


def live_memory(parameters: float, each: int, method: str, density: float) -> float:
    """Bytes of the live part: values, gradients, state and index."""
    return parameters * live(density) * (2 * each + 4 * STATE[method] + INDEX)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def counted(rows: list[dict[str, Any]]) -> str:
    """MB per rank."""
    columns = ("payload", "wire", "loopback", "weights", "gradients", "state", "kept", "index")
    lines = []
    for row in rows:
        step = "all weights" if row["margin"] is None else f"coarse, {row['density']:.0%}, margin {row['margin']:g}"
        lines.append([str(row["ranks"]), row["method"], step, *(number(row[name] / 1e6) for name in columns)])
    return table(["ranks", "method", "step", *columns], lines)


def sent(each: int) -> str:
    """GB that a rank sends in a step, and the seconds that takes."""

    def cell(size: float) -> str:
        return f"{number(size / 1e9)} ({number(size / BANDWIDTH)} s)"

    lines = []
    for name, parameters in SIZES.items():
        for ranks in RANKS:
            dense = reduced(parameters, each, ranks)
            shares = [cycle(d) for d in DENSITIES] + [live(d) for d in DENSITIES]
            full = sharded(parameters, each, ranks)
            lines.append([name, str(ranks), cell(full), cell(dense), *(cell(share * dense) for share in shares)])
    head = ["FSDP", "DDP", *(f"multilevel {d:.0%}" for d in DENSITIES), *(f"coarse step {d:.0%}" for d in DENSITIES)]
    return table(["parameters", "ranks", *head], lines)


def held(each: int) -> str:
    """GB that a rank holds, without activations; the gradients are DDP's buckets (`gradient_as_bucket_view=True`)."""
    lines = []
    for name, parameters in SIZES.items():
        sizes = [memory(parameters, each, method) for method in STATE]
        sizes += [live_memory(parameters, each, "AdaBreg", density) for density in DENSITIES]
        lines.append([name, "DDP, any", *(number(size / 1e9) for size in sizes)])
        for ranks in RANKS:
            shares = [number(memory(parameters, each, method) / ranks / 1e9) for method in STATE]
            lines.append([name, f"FSDP, {ranks}", *shares, *("—" for _ in DENSITIES)])
    return table(["parameters", "ranks", *STATE, *(f"live part {d:.0%}" for d in DENSITIES)], lines)


def main() -> None:
    result = json.loads(COUNTED.read_text())
    print(f"## Counted: {result['network']}, {result['machine']}; MB per rank and step\n\n{counted(result['rows'])}\n")
    for each, name in ((4, "float32"), (2, "bfloat16")):
        print(
            f"## Computed: GB sent by a rank in a step (seconds at {BANDWIDTH / 1e9:g} GB/s), {name}\n\n{sent(each)}\n"
        )
    for each, name in ((4, "float32"), (2, "bfloat16 weights and gradients, float32 state")):
        print(f"## Computed: GB held by a rank, {name}\n\n{held(each)}\n")


if __name__ == "__main__":
    main()
