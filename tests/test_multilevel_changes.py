"""What is frozen, thawed, added or replaced in the middle of a run under Multilevel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import pairwise
from test_multilevel import OPTIMIZERS, _double, batch, train  # noqa: F401 - fixtures
from test_multilevel_hooks import choose, normed
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb

WAYS = {"masked": (tb.L1(), False), "sparse": (tb.L1(), True), "compact": (tb.GroupL1("rows"), True)}


def started(way: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Sequential, Any, tb.Multilevel]:
    regularizer, fast = way
    choose(monkeypatch, fast=fast)
    model = normed()
    optimizer = OPTIMIZERS[name](tb.param_groups(model, regularizer, lam=0.05))
    return model, optimizer, tb.Multilevel(model, optimizer, coarse_steps=4)


def values(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


@pairwise({"way": WAYS, "since": [0, 2, 3, 5], "name": ["linbreg", "paper momentum", "adabreg", "decay"]})
def test_frozen_layers_rest_and_move_again(way: Any, since: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, levels = started(way, name, monkeypatch)
    control = tb.TargetDensity(optimizer, 0.3, total_steps=20)
    train(model, optimizer, range(since), control.step, levels.step)
    frozen = nn.ModuleList([model[0], model[3]])
    frozen.requires_grad_(False)
    before, others = values(frozen), values(model[6])
    train(model, optimizer, range(since, 12), control.step, levels.step)
    assert equal(values(frozen), before)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert not equal(values(model[6]), others)
    frozen.requires_grad_(True)
    train(model, optimizer, range(12, 16), control.step, levels.step)
    assert not torch.equal(model[3].bias, before[3])
    assert not torch.equal(model[3].weight, before[2])


def test_a_bias_that_is_trained_from_the_middle_of_a_compact_phase_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, levels = started(WAYS["compact"], "linbreg", monkeypatch)
    model[3].bias.requires_grad_(False)
    train(model, optimizer, range(2), levels.step)
    network = levels._modules.network
    assert network is not None
    assert network.compact is not None
    assert len(network.compact.model[3].bias) < 15
    with torch.no_grad():
        model[3].bias.add_(1.0)
    x, _ = batch(0)
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    model[3].bias.requires_grad_(True)
    before = model[3].bias.detach().clone()
    train(model, optimizer, range(2, 3), levels.step)
    assert levels.restricted
    assert not torch.equal(model[3].bias, before)


@pairwise({"way": WAYS, "since": [0, 2, 4, 5], "change": ["longer", "new head"]})
def test_layers_that_come_later_are_trained(way: Any, since: int, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, levels = started(way, "linbreg", monkeypatch)
    control = tb.TargetDensity(optimizer, 0.3, total_steps=20)
    train(model, optimizer, range(since), control.step, levels.step)
    new = tb.sparse_init_(
        nn.Sequential(nn.Linear(3 if change == "longer" else 15, 40), nn.ReLU(), nn.Linear(40, 3)), 0.5
    )
    if change == "longer":
        for module in new:
            model.append(module)
    else:
        model[6] = new
    for group in tb.param_groups(new, way[0], lam=0.05):
        optimizer.add_param_group(group)
    before = values(new)
    for i in range(since, 16):
        x, y = batch(i)
        optimizer.zero_grad()
        twin = copy.deepcopy(model)
        losses = [F.cross_entropy(net(x), y) for net in (model, twin)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(new[2].bias.grad, (twin[9] if change == "longer" else twin[6][2]).bias.grad)
        optimizer.step()
        control.step()
        levels.step()
    assert levels.counts["coarse"] >= 10
    assert all(not torch.equal(p, q) for p, q in zip(values(new), before, strict=True))
    assert "came after Multilevel was made: " + ("7, 9" if change == "longer" else "6.0, 6.2") in str(levels.report)
