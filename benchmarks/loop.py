"""How much the training loop costs over the bare forward, backward and step: paired epochs, the median of their ratios.

    python benchmarks/loop.py [--pairs 9]

Both run the same network (784-200-80-10), batches of 128, AdaBreg and TargetDensity, on as many images as MNIST has:
once as `torch-bregman train` does it (its own `fit`, without augmentation; evaluation and files are outside an epoch's
seconds), once as the shortest loop that does the same steps on batches that lie ready.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.models import build
from torch_bregman.train import Recipe, fit

SAMPLES, BATCH = 55_000, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9, help="epochs of each kind")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, 784)).astype(np.float32)
    y = x[:, :10].argmax(1)
    loop, bare = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.npz"
        few = slice(0, 100)
        np.savez(path, x_train=x, y_train=y, x_val=x[few], y_val=y[few], x_test=x[few], y_test=y[few])
        for pair in range(options.pairs):
            recipe = Recipe(dataset=str(path), epochs=2, threads=1).check()
            run = Path(folder) / f"run{pair}"
            fit(recipe, run, quiet=True)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            loop.append(rows[2]["seconds"])
            bare.append(bare_epoch(torch.from_numpy(x), torch.from_numpy(y)))
    ratios = [a / b for a, b in zip(loop, bare, strict=True)]
    print(f"loop   median {statistics.median(loop):.3f} s an epoch   (min {min(loop):.3f}, max {max(loop):.3f})")
    print(f"bare   median {statistics.median(bare):.3f} s an epoch   (min {min(bare):.3f}, max {max(bare):.3f})")
    print(f"ratio  median {statistics.median(ratios):.3f}             (min {min(ratios):.3f}, max {max(ratios):.3f})")


def bare_epoch(x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of the second epoch of forward, backward, step and control.step over ready batches."""
    torch.manual_seed(0)
    model = tb.sparse_init_(build("mlp", (784,), 10))
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-2, eps=1e-4)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    control = tb.TargetDensity(optimizer, 0.05, total_steps=2 * len(batches))
    seconds = 0.0
    for _ in range(2):
        start = time.perf_counter()
        for inputs, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            control.step()
        seconds = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    main()
