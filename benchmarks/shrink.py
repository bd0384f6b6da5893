"""Random group sparsity on the networks of tests/test_shrink.py: what `shrink` leaves, and how far the outputs move.

    python benchmarks/shrink.py [--seeds 3]

Rows of Linear, filters of Conv, heads of attention and columns of embeddings are zeroed at random. The difference is
the largest of all outputs on inputs that `shrink` has not seen, relative to the largest output: of the float32
networks, and of the same weights in float64 arithmetic.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import torch_bregman as tb

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_shrink import NETWORKS, difference, example, kill, lived


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print(f"{'network':12}{'dead':>6}{'parameters left':>18}{'float32':>10}{'float64':>10}   dead units that stay")
    for name, (build, _) in NETWORKS.items():
        for share in (0.5, 0.8, 0.95):
            left, single, double, kept, reasons = [], 0.0, 0.0, 0, set()
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                model = lived(build()).eval()
                kill(model, share)
                small = tb.shrink(model, (example(name),))
                before, after = small.report.parameters
                left.append(after / before)
                x = example(name)
                with torch.no_grad():
                    y, z = model(x), small.model(x)
                single = max(single, float((y - z).abs().max() / y.abs().max().clamp_min(1e-30)))
                double = max(double, difference(model, small.model, x))
                kept += sum(row.kept for row in small.report.rows)
                reasons |= {part for row in small.report.rows if row.kept for part in row.reason.split("; ")}
            print(
                f"{name:12}{share:6.0%}{min(left):10.1%} to{max(left):6.1%}{single:9.0e}{double:9.0e}   {kept}, for "
                f"{len(reasons)} reasons",
                flush=True,
            )


if __name__ == "__main__":
    main()
