"""What the rows of metrics.jsonl say of a run."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..density import sparsity_report
from ..distributed import local, sum_over_parts
from ..layers import forward_flops as layer_flops
from ..layers import weight_layers
from ..models.skip import skips
from ..multilevel import Multilevel
from ..report.words import near
from ..rivals import Rival, training_flops
from .training import Training


def epoch_row(
    training: Training, epoch: int, train_loss: float | None, scores: dict[str, float], seconds: float, rate: float
) -> dict[str, Any]:
    """The row of an epoch, 0 for the start; `rate`: images a second."""
    report = sparsity_report(training.model)
    group = training.optimizer.param_groups[0]
    lam = group.get("lam")
    return {
        "epoch": epoch, "train_loss": train_loss, **scores, "density": report.density,
        "on_target": near(report.density, training.asked), "l1_norm": l1_norm(training.model),
        "lam": float(lam) if lam is not None else None, "lr": float(group["lr"]),
        "seconds": round(seconds, 3), "images_per_second": round(rate),
        "layers": {layer.name: layer.density for layer in report.layers},
        "kept_layers": {layer.name: layer.weights[0] for layer in report.layers},
        "size_layers": {layer.name: layer.weights[1] for layer in report.layers},
        "shape_layers": {layer.name: list(layer.shape) for layer in report.layers},
    }  # fmt: skip


def end_row(training: Training, scores: dict[str, float], seconds: float) -> dict[str, Any]:
    """The row of a run that took so many seconds, and whose network has these scores on the test data."""
    model, data, best, levels = training.model, training.data, training.best, training.levels
    report = sparsity_report(model)
    kept, size = report.weights
    forward, samples = forward_flops(model, data.train.x[:1]), len(data.train) * training.recipe.epochs
    end = {
        "event": "end",
        "asked_density": training.asked, "density": kept / size, "kept": kept, "weights": size,
        **{name.replace("val_", "test_"): value for name, value in scores.items()},
        **{name: value for name, value in best.items() if name.startswith("val_")},
        "widths": [layer.outputs[0] for layer in report.layers],
        "full_widths": [layer.outputs[1] for layer in report.layers],
        "kept_linear": share([layer.weights for layer in report.layers if len(layer.shape) == 2]),
        "kept_kernels": share([report.kernels]),
        "best_epoch": best.get("epoch"), "lam": training.rows[-1]["lam"], "seconds": round(seconds, 3),
        "note": data.note, "uncounted": uncounted(model),
        "dense_flops": training_flops(forward, {}, samples), **work(levels),
        "sparse_flops": sparse_flops(forward, samples, training.rows, training.rival, levels),
    }  # fmt: skip
    if gates := skips(model):
        end["skips"] = gates
    if levels:
        end["choices"] = levels.report.rows()
    return end


def uncounted(model: nn.Module) -> str:
    """Which matrices the density does not count, and how many entries it counts; nothing where it counts all."""
    report = sparsity_report(model)
    return report.coverage if report.outside else ""


@torch.no_grad()
def l1_norm(model: nn.Module) -> float:
    """The sum of |w| over all Linear and Conv weights."""
    weights = [layer.weight for layer in weight_layers(model)]
    return float(sum_over_parts(torch.stack([local(w).abs().sum() for w in weights]), weights).sum())


def work(levels: Multilevel | None) -> dict[str, Any]:
    """The steps of each kind so far and their FLOPs, beside those of dense steps."""
    if levels is None:
        return {}
    fine, coarse = levels.counts["fine"], levels.counts["coarse"]
    return {"fine_steps": fine, "coarse_steps": coarse, "flops": levels.flops, "dense_flops": levels.dense_flops}


def forward_flops(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Weight of a Linear or Conv layer → FLOPs of its dense forward pass on `x`."""
    training = model.training
    counts = layer_flops(model.eval(), (x,))
    model.train(training)
    return {name: float(counts.get(name.rpartition(".")[0], 0)) for name, _, _ in weight_layers(model)}


def sparse_flops(
    forward: dict[str, float], samples: int, rows: list[dict[str, Any]], rival: Rival | None, levels: Multilevel | None
) -> float:
    """FLOPs of the run on `samples` samples if zeros cost nothing (`training_flops`); `forward`: of one of them.

    A Bregman step needs the gradient of all weights, but for the coarse ones. Its densities are those before and after
    each epoch, averaged; a rival counts those of its steps.
    """
    if rival is not None:
        return rival.flops({name: flops * samples / rival.steps for name, flops in forward.items()})
    layers = [row["layers"] for row in rows]
    ends = list(itertools.pairwise(layers))
    densities = {name: sum(a[name] + b[name] for a, b in ends) / (2 * len(ends)) for name in forward}
    if min(densities.values()) == 1:  # trained dense
        return training_flops(forward, {}, samples)
    coarse = levels.counts["coarse"] / levels.counts.total() if levels is not None else 0.0
    return training_flops(forward, densities, samples, round(samples * (1 - coarse)))


def share(counts: list[tuple[int, int]]) -> float | None:
    """What is alive of all; None where there is nothing."""
    size = sum(size for _, size in counts)
    return sum(alive for alive, _ in counts) / size if size else None
