"""The step, the coarse step and inference of this checkout beside those of another one, paired in one run.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--only step] [--rounds 40] [--threads 2]

Each checkout has a process of its own, which makes all cases ready once. In every round both time one case after the
other, in random order, so that what the machine does beside it meets both. Printed are the medians of both and of the
ratios of the rounds, this one over the other, with the quartiles of the ratios. Only public names are used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CALLS = 0.02  # seconds of calls in a row
REST = 0.02  # seconds in which the threads of the other process stop to wait for work with all their might


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """What is timed, by name: functions that make it ready and return the call."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import torch_bregman as tb
    from torch_bregman.models import build

    def step(kind: str, shapes: Callable[[], list[tuple[int, ...]]], regularizer: tb.Regularizer, fused: bool):
        def make() -> Callable[[], object]:
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(s) * (torch.rand(s) < 0.05)) for s in shapes()]
            for p in params:
                p.grad = torch.randn_like(p) * 1e-3
            options = {"LinBreg": {"lr": 0.1, "momentum": 0.9}, "ProxSGD": {"lr": 0.1}, "AdaBreg": {"lr": 1e-3}}
            optimizer = getattr(tb, kind)(params, regularizer=regularizer, lam=0.5, fused=fused, **options[kind])
            return optimizer.step

        return make

    def resnet() -> list[tuple[int, ...]]:
        return [tuple(p.shape) for p in build("resnet18", (3, 32, 32), 10).parameters() if p.dim() > 1]

    def many() -> list[tuple[int, ...]]:
        return [(1000,)] * 1000

    def matrices() -> list[tuple[int, ...]]:
        return [(1024, 1024)] * 4

    def mlp(width: int, **options: object) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        return tb.sparse_init_(model, generator=torch.Generator().manual_seed(0), **options)

    def coarse(density: float, groups: str | None):
        def make() -> Callable[[], object]:
            model = mlp(2048, density=density, groups=groups)
            regularizer = tb.L1() if groups is None else tb.GroupL1(groups)
            # A step size of nearly nothing: the pattern stays what it is.
            optimizer = tb.LinBreg(tb.param_groups(model, regularizer, lam=0.1), lr=1e-9, fused=True)
            levels = tb.Multilevel(model, optimizer, coarse_steps=1 << 30, margin=0.0)
            x, y = torch.randn(128, 784), torch.randint(0, 10, (128,))

            def run() -> None:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                levels.step()

            for _ in range(5):
                run()
            return run

        return make

    def inference(batch: int):
        def make() -> Callable[[], object]:
            model = mlp(1024, density=0.05).eval()
            x = torch.randn(batch, 784)
            fast = tb.optimize_for_inference(model, (x,))

            def run() -> None:
                with torch.inference_mode():
                    fast(x)

            return run

        return make

    return {
        "step LinBreg ResNet-18 fused": step("LinBreg", resnet, tb.L1(), True),
        "step AdaBreg ResNet-18 fused": step("AdaBreg", resnet, tb.L1(), True),
        "step AdaBreg 1,000 × 1,000 fused": step("AdaBreg", many, tb.L1(), True),
        "step AdaBreg 1,000 × 1,000 plain": step("AdaBreg", many, tb.L1(), False),
        "step LinBreg 4 × 1,024² rows fused": step("LinBreg", matrices, tb.GroupL1("rows"), True),
        "step ProxSGD 4 × 1,024² plain": step("ProxSGD", matrices, tb.L1(), False),
        "coarse step MLP 5 %": coarse(0.05, None),
        "coarse step MLP 1 %": coarse(0.01, None),
        "coarse step MLP 10 % of the rows": coarse(0.1, "rows"),
        "inference MLP batch 64": inference(64),
        "inference MLP batch 1": inference(1),
    }


def work(threads: int, only: str) -> None:
    """A process that is told names of cases on its input, one a line, and answers with seconds per call."""
    import torch

    torch.set_num_threads(threads)
    ready, calls = {}, {}
    for name, make in cases().items():
        if only in name:
            run = ready[name] = make()
            for _ in range(3):
                run()
            start = time.perf_counter()
            run()
            calls[name] = max(1, int(CALLS / (time.perf_counter() - start)))
    print(json.dumps(list(ready)), flush=True)
    for line in sys.stdin:
        name = line.strip()
        start = time.perf_counter()
        for _ in range(calls[name]):
            ready[name]()
        print((time.perf_counter() - start) / calls[name], flush=True)


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the checkout to compare with")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.threads, options.only)
        return
    if options.other is None or not (options.other / "src" / "torch_bregman").is_dir():
        parser.error(f"expected the folder of a checkout; got {options.other}")
    homes = [Path(__file__).resolve().parents[1], options.other.resolve()]
    told = ["--work", "--threads", str(options.threads), "--only", options.only]
    workers, names = [], []
    for home in homes:  # one after the other: making ready includes choices by measurement
        env = {**os.environ, "PYTHONPATH": str(home / "src")}
        command = [sys.executable, __file__, *told]
        workers.append(subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env))
        names = json.loads(workers[-1].stdout.readline())
    times = {name: ([], []) for name in names}
    for _ in range(options.rounds):
        for name in names:
            for i in random.sample((0, 1), 2):
                time.sleep(REST)
                workers[i].stdin.write(name + "\n")
                workers[i].stdin.flush()
                times[name][i].append(float(workers[i].stdout.readline()))
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    print(f"{options.rounds} rounds, {options.threads} threads; ratio: this checkout over the other")
    width = max(map(len, names))
    print(f"{'':{width}}  this ms  other ms  ratio  quartiles")
    for name, (here, there) in times.items():
        ratios = [a / b for a, b in zip(here, there, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        a, b = (1e3 * statistics.median(some) for some in (here, there))
        print(f"{name:{width}}  {a:7.3f}  {b:8.3f}  {middle:5.3f}  {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
