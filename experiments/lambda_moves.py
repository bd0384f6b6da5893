"""What should happen to v and θ when λ moves? The candidates, on MNIST, judged on validation data only.

    python experiments/lambda_moves.py --data-root DIR [--epochs 12] [--seeds 0 1 2]

    leave     v stays; every live weight shrinks by δ·Δλ when λ rises, and the smallest die (the default)
    keep      the smallest die, the others keep their θ: v ← θ/δ + λ′p on them
    rescale   θ stays, the memory keeps its share of the threshold: v ← θ/δ + (λ′/λ)(v − θ/δ)
    once      leave, but the exact density is set in the last step only

Writes experiments/results/lambda_moves.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torch_bregman as tb
from torch_bregman.control import Scope
from torch_bregman.optim import RegularizedOptimizer
from torch_bregman.optim.base import primal
from torch_bregman.train import Recipe, fit, training


class Keep(Scope):
    """Weights that survive a change of λ keep their value."""

    @torch.no_grad()
    def scale(self, optimizer: RegularizedOptimizer, factor: float) -> None:
        before = [optimizer.param_groups[i]["lam"] for i in self.groups]
        super().scale(optimizer, factor)
        for i, old in zip(self.groups, before, strict=True):
            lam, delta = optimizer.param_groups[i]["lam"], optimizer.param_groups[i]["delta"]
            for p in optimizer.param_groups[i]["params"]:
                if old > 0 and "dual" in optimizer.state[p]:
                    dual, reg = optimizer.state[p]["dual"], optimizer.regularizers[i]
                    dual.copy_(self.move(dual, primal(dual, reg, old, delta), reg, old, lam, delta))
            optimizer.refresh([i])

    @staticmethod
    def move(dual: Tensor, weight: Tensor, reg: Any, old: float, lam: float, delta: float) -> Tensor:
        new = primal(dual, reg, lam, delta)
        survivors = torch.where((weight != 0) & (new != 0), weight, new)
        return survivors / delta + lam * reg.nearest_subgradient(survivors, dual / lam)


class Rescale(Keep):
    """No weight changes; what is remembered is stretched with λ."""

    @staticmethod
    def move(dual: Tensor, weight: Tensor, reg: Any, old: float, lam: float, delta: float) -> Tensor:
        return weight / delta + (lam / old) * (dual - weight / delta)


MOVES: dict[str, dict[str, Any]] = {
    "leave": {},
    "keep": {"scope": Keep},
    "rescale": {"scope": Rescale},
    "once": {"settle": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    for density in (0.05, 0.01):
        for name, how in MOVES.items():
            training.make_control = control(**how)
            accuracies, kept = [], []
            for seed in options.seeds:
                recipe = Recipe(dataset="mnist", density=density, epochs=options.epochs, seed=seed).check()
                with tempfile.TemporaryDirectory() as run:
                    fit(recipe, Path(run), data_root=options.data_root, quiet=True)
                    last = json.loads((Path(run) / "metrics.jsonl").read_text().splitlines()[-2])
                accuracies.append(last["val_accuracy"])
                kept.append(last["density"])
            mean, spread = statistics.mean(accuracies), statistics.stdev(accuracies)
            rows.append({"move": name, "asked": density, "kept": kept, "val_accuracy": accuracies,
                         "val_accuracy_mean": mean, "val_accuracy_std": spread})  # fmt: skip
            print(
                f"» {density:.0%} {name:8} validation {100 * mean:.2f} ± {100 * spread:.2f} %  kept {kept}", flush=True
            )
    content = {
        "recipe": {"dataset": "mnist", "epochs": options.epochs, "all else": "defaults of torch-bregman train"},
        "command": f"python experiments/lambda_moves.py --data-root DIR --epochs {options.epochs}",
        "environment": {"torch": torch.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        "seeds": options.seeds,
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "lambda_moves.json"
    path.write_text(json.dumps(content, indent=1) + "\n")


def control(scope: type[Scope] = Scope, **options: Any) -> Any:
    """A `make_control` for the training loop that moves λ in the way of `scope`."""

    class Controller(tb.TargetDensity):
        _make = scope

    def make(recipe: Recipe, optimizer: RegularizedOptimizer, model: torch.nn.Module, steps: int) -> tb.TargetDensity:
        assert recipe.density is not None
        return Controller(optimizer, recipe.density, recipe.control, steps, model=model, **options)

    return make


if __name__ == "__main__":
    main()
