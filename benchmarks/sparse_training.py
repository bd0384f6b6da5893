"""Training on the live weights alone, beside dense training, through the public API.

    python benchmarks/sparse_training.py [--only steps|groups|small|memory|run] [--rounds 15] [--data-root DIR]

steps, groups: a whole training step (zero_grad, forward, backward, optimizer, `Multilevel.step`) in a coarse phase
against that of the dense network with torch's fused optimizer, in turn and in random order: medians, and the median of
the ratios of paired rounds. small: the defaults of `Multilevel` where there is nothing to gain, against the same
optimizer without it. memory: what the optimizer holds in a coarse phase. run: a whole run with the defaults to the
accuracy of the dense twin minus half a point, on validation data; needs Fashion-MNIST.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import paired
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.models import convnet, mlp, resnet18
from torch_bregman.train import Recipe, fit, training
from torch_bregman.train.recipe import make_optimizer

IMAGE, COLOUR = (1, 28, 28), (3, 32, 32)


def large_mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """784-4096-4096-10."""
    return mlp(shape, classes, hidden=(4096, 4096))


def wide_convnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Three 3×3 convolutions of 256 filters with BatchNorm on a 32×32 image."""
    layers: list[nn.Module] = []
    for before in (shape[0], 256, 256):
        layers += [nn.Conv2d(before, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * 16, classes))


def step_of(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, levels: Any = None) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if levels is not None:
            levels.step()

    return step


def steps_of(jobs: dict[str, Callable[[], None]], rounds: int, warm: int = 3) -> dict[str, list[float]]:
    """Milliseconds of a step; in each round all jobs in random order, four steps each of which three are timed.

    Steps follow each other as they do in training: after one of another network the caches hold nothing of this one.
    """
    took = paired(jobs, rounds, skip=warm, untimed=1, calls=3)
    return {name: [1e3 * seconds for seconds in row] for name, row in took.items()}


def line(label: str, took: dict[str, list[float]], note: str = "") -> None:
    dense, ours = took["dense"], took["ours"]
    ratio = statistics.median(a / b for a, b in zip(dense, ours, strict=True))
    print(
        f"{label:52}{statistics.median(dense):10.2f}{statistics.median(ours):10.2f}{ratio:8.2f} x   {note}", flush=True
    )


def data(shape: tuple[int, ...], batch: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator)
    return x, torch.randint(0, classes, (batch,), generator=generator)


def coarse(
    make: Any, shape: tuple[int, ...], batch: int, kind: str, density: float, groups: Any = None, device: str = "cpu"
) -> tuple[dict[str, Callable[[], None]], Any]:
    """A dense step and a coarse one of the same network; `groups`: (regulariser, groups of the start)."""
    x, y = (t.to(device) for t in data(shape, batch))
    layout = {"memory_format": torch.channels_last} if make is not large_mlp else {}
    x = x.contiguous(**layout) if layout else x
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make(shape, 10).to(device, **layout))
    dense, sparse = models
    lr = 1e-6  # nothing comes alive or dies while the time is taken
    rival = {"LinBreg": torch.optim.SGD, "AdaBreg": torch.optim.Adam}[kind](dense.parameters(), lr, fused=True)
    if groups is None:
        tb.sparse_init_(sparse, density)
        regularizer: Any = tb.L1()
    else:
        regularizer = {nn.Linear: tb.GroupL1("rows"), nn.Conv2d: tb.GroupL1("filters")}
        *body, head = [m for m in sparse.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for module in body:
            tb.sparse_init_(module, density, "rows" if isinstance(module, nn.Linear) else "filters")
        names = {module: name for name, module in sparse.named_modules()}
        regularizer = {f"{names[head]}.*": None, **regularizer}
    optimizer = getattr(tb, kind)(tb.param_groups(sparse, regularizer, lam=1e-3), lr=lr)
    levels = tb.Multilevel(sparse, optimizer, coarse_steps=1_000_000, fine_steps=1)
    jobs = {
        "dense": step_of(dense, rival, x, y),
        "ours": step_of(sparse, optimizer, x, y, levels),
    }
    jobs["ours"]()  # the fine step
    return jobs, levels


def head(title: str) -> None:
    print(f"\n{title:52}{'dense ms':>10}{'ours ms':>10}{'faster':>10}", flush=True)


def steps(rounds: int) -> None:
    head("coarse step, single weights")
    for kind, densities in (("LinBreg", (0.05, 0.02, 0.01)), ("AdaBreg", (0.05, 0.02, 0.01))):
        for density in densities:
            jobs, levels = coarse(large_mlp, IMAGE, 128, kind, density)
            line(f"MLP 784-4096-4096-10, {kind}, {density:.0%}", steps_of(jobs, rounds), computes(levels))
    for density in (0.1, 0.03):
        jobs, levels = coarse(convnet, IMAGE, 128, "LinBreg", density)
        line(f"the paper's ConvNet, LinBreg, {density:.0%}", steps_of(jobs, 3 * rounds), computes(levels))
    jobs, levels = coarse(mlp, IMAGE, 128, "AdaBreg", 0.05)
    line("MLP 784-200-80-10, AdaBreg, 5%", steps_of(jobs, 20 * rounds), computes(levels))


def groups(rounds: int, device: str) -> None:
    head(f"coarse step, groups, on {device}")
    tasks: list[tuple[str, Any, tuple[int, ...], int, float]] = [
        ("MLP 784-4096-4096-10, 10% of the neurons", large_mlp, IMAGE, 128, 0.1),
        ("ConvNet of 3 x 256 filters, 10% of the filters", wide_convnet, COLOUR, 64, 0.1),
        ("ResNet-18, 10% of the filters", resnet18, COLOUR, 32, 0.1),
        ("ResNet-18, 25% of the filters", resnet18, COLOUR, 32 if device == "cpu" else 128, 0.25),
    ]
    for label, make, shape, batch, density in tasks:
        jobs, levels = coarse(make, shape, batch, "LinBreg", density, groups=True, device=device)
        if device != "cpu":
            jobs = {name: synchronised(job) for name, job in jobs.items()}
        line(f"{label}, batch {batch}", steps_of(jobs, max(3, rounds // 3)), computes(levels))


def synchronised(job: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        job()
        torch.cuda.synchronize()

    return run


def small(rounds: int) -> None:
    head("defaults where there is little to gain")
    tasks: list[tuple[str, Any, tuple[int, ...], int, float]] = [
        ("MLP 64-200-80-10, 5%", mlp, (1, 8, 8), 128, 0.05),
        ("MLP 784-200-80-10, 50%", mlp, IMAGE, 128, 0.5),
        ("MLP 784-4096-4096-10, 60%", large_mlp, IMAGE, 128, 0.6),
        ("the paper's ConvNet, 60%", convnet, IMAGE, 128, 0.6),
    ]
    for label, make, shape, batch, density in tasks:
        x, y = data(shape, batch)
        jobs, all_levels = {}, []
        for name in ("dense", "ours"):
            torch.manual_seed(0)
            model = make(shape, 10)
            tb.sparse_init_(model, density)
            optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=1e-3), lr=1e-6)
            all_levels.append(tb.Multilevel(model, optimizer) if name == "ours" else None)
            jobs[name] = step_of(model, optimizer, x, y, all_levels[-1])
        large = make is large_mlp
        took = steps_of(jobs, rounds if large else 20 * rounds, warm=5 if large else 250)
        line(label, took, f"fine steps {all_levels[1].counts['fine']}, coarse {all_levels[1].counts['coarse']}")


def memory() -> None:
    print(
        "\nwhat the optimizer holds in a coarse phase, MLP 784-4096-4096-10, AdaBreg, MB (parameters, state, gradients)"
    )
    for density in (1.0, 0.05, 0.02, 0.01):
        x, y = data(IMAGE, 128)
        torch.manual_seed(0)
        model = large_mlp(IMAGE, 10)
        if density < 1:
            tb.sparse_init_(model, density)
        optimizer: Any = tb.AdaBreg(tb.param_groups(model, tb.L1() if density < 1 else None, lam=1e-3), lr=1e-6)
        levels = tb.Multilevel(model, optimizer, coarse_steps=1000, fine_steps=1) if density < 1 else None
        for _ in range(3):
            step_of(model, optimizer, x, y, levels)()
        held = [p for group in optimizer.param_groups for p in group["params"] if p.dim() != 1 or p.numel() > 4096]
        sizes = [
            sum(p.numel() for p in held),
            sum(t.numel() for p in held for t in optimizer.state[p].values() if isinstance(t, Tensor)),
            sum(p.grad.numel() for p in held if p.grad is not None),
        ]
        left = sum(p.grad.numel() for p in model.parameters() if p.grad is not None and p.dim() > 1)
        print(
            f"  {density:6.0%}"
            + "".join(f"{4e-6 * n:10.2f}" for n in sizes)
            + f"   dense gradients {4e-6 * left * (density < 1):.2f}"
        )


def computes(levels: Any) -> str:
    return ", ".join(f"{name}: {choice.kind}" for name, choice in levels.choices.items())


def run(root: Path | None, density: float, epochs: int) -> None:
    """Dense Adam and the multilevel defaults: seconds until the validation accuracy is the dense one's minus 0.5."""
    print(f"\nFashion-MNIST, MLP 784-4096-4096-10, batch 128, {epochs} epochs each", flush=True)
    base = {"dataset": "fashion-mnist", "model": "sparse_training:large_mlp", "epochs": epochs}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, options in (
        ("dense Adam", {"optimizer": "adam"}),
        (f"AdaBreg, multilevel, {density:.0%}", {"density": density, "multilevel": True}),
    ):
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(training, "make_optimizer", fused):
            fit(Recipe(**base, **options).check(), Path(folder), data_root=root, quiet=True)
            rows[name] = _metrics(Path(folder))
    target = max(row["val_accuracy"] for row in rows["dense Adam"] if row.get("epoch")) - 0.005
    for name, all_rows in rows.items():
        epochs_ = [row for row in all_rows if row.get("epoch")]
        spent, reached = 0.0, None
        for row in epochs_:
            spent += row["seconds"]
            if reached is None and row["val_accuracy"] >= target:
                reached = spent
        print(
            f"{name:32} whole run {spent:7.1f} s, best validation {max(r['val_accuracy'] for r in epochs_):.2%}, last "
            f"{epochs_[-1]['val_accuracy']:.2%}, density {epochs_[-1]['density']:.2%}, "
            f"{target:.2%} after {'—' if reached is None else f'{reached:.1f} s'}",
            flush=True,
        )
    times = [sum(row["seconds"] for row in all_rows if row.get("epoch")) for all_rows in rows.values()]
    print(f"whole runs: {times[0] / times[1]:.2f} x less wall time")


def fused(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the command, but for dense ones with torch's fused step."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), recipe.lr, eps=recipe.eps, fused=True)
    return make_optimizer(recipe, model)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["steps", "groups", "small", "memory", "run"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", help="for --only groups")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--density", type=float, default=0.05, help="for --only run")
    parser.add_argument("--epochs", type=int, default=10, help="for --only run")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    wanted = [options.only] if options.only else ["steps", "groups", "small", "memory", "run"]
    for name in wanted:
        if name == "steps":
            steps(options.rounds)
        elif name == "groups":
            groups(options.rounds, options.device)
        elif name == "small":
            small(options.rounds)
        elif name == "memory":
            memory()
        else:
            run(options.data_root, options.density, options.epochs)


if __name__ == "__main__":
    main()
