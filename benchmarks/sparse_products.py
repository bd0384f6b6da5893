"""The sparse layer beside the dense one: forward, gradient to the input, gradient to the weights. Paired, medians.

    python benchmarks/sparse_products.py [--rounds 20] [--batch 128]

"of peak" is 2·batch·live operations over the time, as a share of what the dense product reaches in the same run.
"""

from __future__ import annotations

import argparse
import platform
import statistics

import torch
from common import paired, parts
from torch.nn import functional as F

from torch_bregman.multilevel.linear import Pattern, sparse_linear

SHAPES = [(1024, 4096), (4096, 1024), (4096, 4096), (200, 784)]
DENSITIES = [0.1, 0.05, 0.02, 0.01]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="calls of each kind")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch}")
    print(f"{'in':>6}{'out':>6}{'density':>9}  {'':12}{'dense ms':>9}{'sparse ms':>10}{'faster':>8}{'of peak':>9}")
    for n, out in SHAPES:
        for density in DENSITIES:
            for part, dense, sparse, ratio in compare(n, out, density, options.batch, options.rounds):
                print(
                    f"{n:6}{out:6}{density:9.0%}  {part:12}{dense * 1e3:9.3f}{sparse * 1e3:10.3f}{ratio:8.1f}"
                    f"{ratio * density:9.0%}"
                )


def compare(n: int, out: int, density: float, batch: int, rounds: int) -> list[tuple[str, float, float, float]]:
    """(part, dense seconds, sparse seconds, their ratio) of each part."""
    torch.manual_seed(0)
    weight = torch.randn(out, n) * (torch.rand(out, n) < density)
    pattern, bias = Pattern(weight), torch.zeros(out)
    values = pattern.restrict(weight)
    # Batch-last, as they come from the layer before; the dense layer gets them as it likes them.
    x, upstream = torch.randn(n, batch).t(), torch.randn(out, batch).t()
    jobs = {
        "dense": parts(lambda x, w: F.linear(x, w, bias), x.contiguous(), weight, upstream.contiguous()),
        "sparse": parts(lambda x, w: sparse_linear(x, w, bias, pattern), x, values, upstream),
    }
    seconds = paired({(kind, part): job for kind, some in jobs.items() for part, job in some.items()}, rounds)
    found = []
    for part in jobs["dense"]:
        dense, sparse = seconds["dense", part], seconds["sparse", part]
        ratio = statistics.median(a / b for a, b in zip(dense, sparse, strict=True))
        found.append((part, statistics.median(dense), statistics.median(sparse), ratio))
    return found


if __name__ == "__main__":
    main()
