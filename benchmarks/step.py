"""What an optimizer step costs beside torch's own: paired timings, medians of ratios, and how far from the floor.

    python benchmarks/step.py [--sizes mlp resnet18 large many] [--rounds 25] [--device cpu]

Every method works on the same tensors in turn, in random order: θ, g and three state tensors, whose content is put back
before each call. So none is luckier with its memory than another, and the density stays what the table says.

"bytes" is what a step has to move per entry, a write that was not read first counting twice, for the line is fetched;
of θ only the cache lines with a live weight count. "GB/s" is that over the time, "of copy" its share of what
`Tensor.copy_` reaches here in the same run (12 bytes an entry).
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import torch_bregman as tb
from torch_bregman.models import build

SIZES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "mlp": lambda: [tuple(p.shape) for p in build("mlp", (784,), 10).parameters()],
    "resnet18": lambda: [tuple(p.shape) for p in build("resnet18", (3, 32, 32), 10).parameters()],
    "large": lambda: [(4096, 4096)] * 4,
    "many": lambda: [(1000,)] * 1000,
}
QUANTILE = {0.05: 1.959964, 0.01: 2.575829}  # |v| > λ for this share of a standard normal v
STATE = ("first", "second", "third")


class Memory:
    """θ, g and three state tensors for every shape, and what they hold at the start of each step."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        torch.manual_seed(0)
        self.tensors = {"theta": [torch.empty(s, device=device) for s in shapes]}
        self.tensors |= {name: [torch.empty(s, device=device) for s in shapes] for name in STATE}
        self.start = {name: [torch.empty_like(t) for t in some] for name, some in self.tensors.items()}
        for v in self.start["first"]:
            v.normal_()
        for m, s in zip(self.start["second"], self.start["third"], strict=True):
            m.normal_(std=1e-5), s.uniform_(1e-7, 1e-6)
        self.grads = [torch.randn(s, device=device) * 1e-3 for s in shapes]
        self.entries = sum(g.numel() for g in self.grads)

    def at(self, density: float) -> float:
        """θ with this density; returns λ."""
        lam = QUANTILE[density]
        for theta, v in zip(self.start["theta"], self.start["first"], strict=True):
            theta.copy_(v - v.clamp(-lam, lam))
        live = sum(
            int((t.flatten()[: t.numel() // 16 * 16].view(-1, 16) != 0).any(1).sum()) for t in self.start["theta"]
        )
        self.lines = live * 16 / self.entries
        return lam

    def restore(self) -> None:
        for name, some in self.tensors.items():
            torch._foreach_copy_(some, self.start[name])

    def params(self) -> list[nn.Parameter]:
        """Parameters over the same memory; each optimizer has its own, or it would see that the others change them."""
        made = [nn.Parameter(t.data) for t in self.tensors["theta"]]
        for p, grad in zip(made, self.grads, strict=True):
            p.grad = grad
        return made

    def give(self, optimizer: torch.optim.Optimizer, **names: str) -> torch.optim.Optimizer:
        """Let the optimizer's state be these tensors."""
        # The kernel of torch's fused Adam reads the counter where the weights are; all others count on the CPU.
        fused = isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["fused"]
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            optimizer.state[p].update({name: self.tensors[mine][i] for name, mine in names.items()})
            if "exp_avg" in names:
                optimizer.state[p]["step"] = torch.tensor(100.0, device=p.device if fused else "cpu")
        return optimizer


def methods(memory: Memory, lam: float, ways: list[dict[str, Any]]) -> dict[str, tuple[str, float, Callable[[], Any]]]:
    """name → (rival, bytes per entry, one step)."""
    p, theta, made = memory.params, 8 * memory.lines, {}

    def add(name: str, rival: str, size: float, optimizer: torch.optim.Optimizer) -> None:
        made[name] = (rival, size, optimizer.step)

    for way in ways:
        (kind,) = way
        sgd = torch.optim.SGD(p(), lr=1e-4, momentum=0.9, **way)
        add(f"SGD momentum {kind}", "SGD momentum fused", 20, memory.give(sgd, momentum_buffer="first"))
        adam = torch.optim.Adam(p(), lr=1e-4, **way)
        add(f"Adam {kind}", "Adam fused", 28, memory.give(adam, exp_avg="second", exp_avg_sq="third"))
        options = {"regularizer": tb.L1(), "lam": lam, "lr": 1e-4, **way}
        for name, size, optimizer, more in (
            ("LinBreg", 12, tb.LinBreg(p(), **options), {}),
            ("LinBreg momentum", 20, tb.LinBreg(p(), momentum=0.9, **options), {"momentum": "second"}),
            ("AdaBreg", 28, tb.AdaBreg(p(), **options), {"exp_avg": "second", "exp_avg_sq": "third"}),
        ):
            memory.give(optimizer, dual="first", **more)
            for q in optimizer.param_groups[0]["params"]:
                optimizer.state[q].update(lam=lam, delta=1.0)
            rival = "Adam fused" if name == "AdaBreg" else "SGD momentum fused"
            add(f"{name} {kind}", rival, size + theta, optimizer)
    return made


def measure(
    made: dict[str, tuple[str, float, Callable[[], Any]]], memory: Memory, rounds: int
) -> dict[str, list[float]]:
    wait = torch.cuda.synchronize if memory.grads[0].is_cuda else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in made}
    order = list(made)
    for round_ in range(rounds + 2):
        random.shuffle(order)
        for name in order:
            memory.restore()
            wait()
            start = time.perf_counter()
            made[name][2]()
            wait()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def table(size: str, density: float, memory: Memory, rounds: int, ways: list[dict[str, Any]]) -> None:
    lam = memory.at(density)
    made = methods(memory, lam, ways)
    big, other = memory.tensors["second"], memory.tensors["third"]
    made["copy"] = ("", 12, lambda: torch._foreach_copy_(big, other))
    seconds = measure(made, memory, rounds)
    copy = 12 / statistics.median(seconds["copy"])
    print(f"\n{size}: {memory.entries:,} entries in {len(memory.grads)} tensors, {density:.0%} non-zero,"
          f" {memory.lines:.0%} of the lines live; medians of {rounds}")  # fmt: skip
    print(f"{'':26}{'ms':>9}{'ratio':>8}{'quartiles':>14}{'bytes':>8}{'floor':>7}{'GB/s':>7}{'of copy':>9}")
    for name, (rival, size_, _) in made.items():
        middle = statistics.median(seconds[name])
        line = f"{name:26}{middle * 1e3:9.3f}"
        if rival:
            ratios = [a / b for a, b in zip(seconds[name], seconds[rival], strict=True)]
            low, _, high = statistics.quantiles(ratios, n=4)
            floor = size_ / made[rival][1]
            line += f"{statistics.median(ratios):8.2f}{f'{low:.2f}–{high:.2f}':>14}{size_:8.1f}{floor:7.2f}"
        else:
            line += f"{'':22}{size_:8.1f}{'':7}"
        print(line + f"{size_ * memory.entries / middle / 1e9:7.1f}{size_ / middle / copy:9.0%}")


def groups_table(size: str, memory: Memory, rounds: int) -> None:
    """GroupL1 on every grouping beside L1, each with 5 % of its groups (entries) alive, tensor by tensor."""
    rivals = {"resnet18": ("filters", "channels", "kernels"), "large": ("rows", "columns")}[size]
    shaped = [i for i, g in enumerate(memory.grads) if g.dim() == (4 if size == "resnet18" else 2)]
    print(f"\n{size}: GroupL1 beside L1 on {len(shaped)} tensors, 5% of the groups alive; medians of {rounds}")
    print(f"{'':26}{'ms':>9}{'ratio':>8}{'quartiles':>14}")
    for kind in ("LinBreg", "AdaBreg"):
        for name in rivals:
            steps, kept = {}, {}
            for reg in (tb.L1(), tb.GroupL1(name)):
                params = memory.params()
                made = []
                for i in shaped:
                    v = memory.start["first"][i]
                    few = reg.thresholds(v).flatten()[:: max(1, v.numel() // 100_000)]
                    lam = float(few.quantile(0.95))
                    made.append({"params": [params[i]], "lam": lam})
                    memory.start["theta"][i].copy_(reg.prox(v, lam))
                optimizer = getattr(tb, kind)(made, lr=1e-4, regularizer=reg, fused=True)
                for i, group in zip(shaped, optimizer.param_groups, strict=True):
                    state = optimizer.state[params[i]]
                    state.update(dual=memory.tensors["first"][i], lam=group["lam"], delta=1.0)
                    if kind == "AdaBreg":
                        state.update(exp_avg=memory.tensors["second"][i], exp_avg_sq=memory.tensors["third"][i])
                        state["step"] = torch.tensor(100.0)
                # θ to the last bit as this step writes it, or it would look like a change from outside.
                memory.restore()
                optimizer.step()
                memory.restore()
                optimizer.refresh()
                for name_ in ("theta", "first"):
                    kept |= {(str(reg), name_, i): memory.tensors[name_][i].clone() for i in shaped}
                steps[str(reg)] = optimizer.step
            seconds: dict[str, list[float]] = {reg: [] for reg in steps}
            for _ in range(3):  # several visits, each of steps in a row: between visits the content is exchanged
                for reg in random.sample(list(steps), len(steps)):
                    for name_ in ("theta", "first"):
                        for i in shaped:
                            memory.start[name_][i].copy_(kept[reg, name_, i])
                    memory.restore()
                    for step in range(2 + rounds // 3):
                        start = time.perf_counter()
                        steps[reg]()
                        if step >= 2:
                            seconds[reg].append(time.perf_counter() - start)
            l1, group_l1 = seconds.values()
            ratios = [a / b for a, b in zip(group_l1, l1, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            ms = statistics.median(group_l1) * 1e3
            print(f"{f'{kind} {name}':26}{ms:9.3f}{middle:8.2f}{f'{low:.2f}–{high:.2f}':>14}")


FIRST_STEP = """
import time, torch, torch_bregman as tb
p = torch.nn.Parameter(torch.zeros(1000)); p.grad = torch.ones(1000)
optimizer = tb.{kind}([p], regularizer=tb.L1(), lam=1.0, fused=True)
start = time.perf_counter(); optimizer.step(); print(time.perf_counter() - start)
"""


def start_up() -> None:
    """Seconds of the first fused step in a new process: compiled, and found in the file cache."""
    print("\nfirst step of a process, seconds (import of Numba included): compiled, then from the file cache")
    for kind in ("LinBreg", "AdaBreg"):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-c", FIRST_STEP.format(kind=kind)]
            environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
            times = [subprocess.run(command, env=environment, capture_output=True, text=True).stdout for _ in range(2)]
        print(f"{kind:26}{float(times[0]):9.1f}{float(times[1]):9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=25, help="steps of each kind")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--only-groups", action="store_true", help="GroupL1 beside L1, and nothing else")
    parser.add_argument("--plain", action="store_true", help="time the readable steps (foreach and one by one) as well")
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {where}, torch {torch.__version__}; ratios to torch's fused step, in the same run")
    ways: list[dict[str, Any]] = [{"fused": True}]
    if options.plain:
        ways += [{"foreach": True}, {"foreach": False}]
    if options.device == "cpu" and not options.only_groups:
        start_up()
    for size in options.sizes:
        memory = Memory(SIZES[size](), options.device)
        for density in () if options.only_groups else QUANTILE:
            table(size, density, memory, options.rounds, ways)
        if size in ("resnet18", "large") and options.device == "cpu":
            groups_table(size, memory, options.rounds)


if __name__ == "__main__":
    main()
