"""What TargetDensity costs: the seconds in `control.step()` over those of the rest of a training step.

    python benchmarks/control.py [--steps 300] [--networks mlp convnet resnet18]

Forward, backward and AdaBreg's step (fused) on random data, batches of 128, at 5 %; λ settles before the clock starts.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.models import build

NETWORKS = {"mlp": (784,), "convnet": (1, 28, 28), "resnet18": (3, 32, 32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps that are timed (a twentieth of it for resnet18)")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':12}{'mode':10}{'step ms':>10}{'control ms':>12}{'share':>8}")
    for name in options.networks:
        steps = max(20, options.steps // (20 if name == "resnet18" else 1))
        for mode in ("feedback", "exact"):
            step, control = measure(name, mode, steps)
            print(f"{name:12}{mode:10}{step * 1e3:10.3f}{control * 1e3:12.4f}{control / step:8.1%}", flush=True)


def measure(name: str, mode: str, steps: int) -> tuple[float, float]:
    """Mean seconds of a training step without the controller, and of the controller, over whole periods of 50 steps."""
    torch.manual_seed(0)
    model = tb.sparse_init_(build(name, NETWORKS[name], 10), 0.05)
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.1), lr=1e-3, fused=True)
    control = tb.TargetDensity(optimizer, 0.05, mode=mode)
    x, y = torch.randn(128, *NETWORKS[name]), torch.randint(10, (128,))
    rest = spent = 0.0
    warm = {"mlp": 1000, "convnet": 100, "resnet18": 3}[name]
    for step in range(warm + steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        middle = time.perf_counter()
        control.step()
        if step >= warm:
            rest += middle - start
            spent += time.perf_counter() - middle
    return rest / steps, spent / steps


if __name__ == "__main__":
    main()
