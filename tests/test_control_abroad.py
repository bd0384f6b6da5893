"""TargetDensity in loops of other people: skipped steps, resuming, freezing, growing, wrapped optimizers."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import torch_bregman as tb

STEPS = 60
SIZE = 64 * 50 + 50 * 10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    tb.sparse_init_(model, 0.02, generator=torch.Generator().manual_seed(0))
    return model


def made(density: float = 0.05, total: int | None = STEPS, mode: str = "feedback"):
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-2)
    return model, optimizer, tb.TargetDensity(optimizer, density, mode, total)


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(32, 64, generator=generator), torch.randint(0, 10, (32,), generator=generator)


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
    optimizer.zero_grad()
    x, y = batch(i)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def alive(*layers: nn.Module) -> float:
    return sum(int((m.weight != 0).sum()) for m in layers) / sum(m.weight.numel() for m in layers)


# ---------------------------------------------------------------------- steps that were none


@pytest.mark.parametrize("mode", ["feedback", "exact"])
@pytest.mark.parametrize("skipped", [{0}, {0, 1, 2}, {5, 30}, {0, STEPS - 1}])
def test_a_step_that_a_scaler_skips_changes_nothing(skipped, mode):
    model, optimizer, control = made(mode=mode)
    scaler = torch.amp.GradScaler("cpu")
    for i in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(i)
        loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (float("inf") if i in skipped else 1)).backward()
        before = [p.clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        lam = control.lam
        control.step()
        if i in skipped and i < STEPS - 1:
            assert control.lam == lam
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert control.steps == STEPS  # the loop counts them, too
    assert tb.density(model) == control.density == pytest.approx(0.05, abs=1 / SIZE)


@pytest.mark.parametrize("calls", ["more", "less"])
def test_steps_are_those_of_the_optimizer(calls):
    """control.step() after every part of an accumulated batch, or after every third step."""
    model, optimizer, control = made()
    reference = made()
    for i in range(STEPS):
        learn(*reference[:2], i)
        reference[2].step()
        learn(model, optimizer, i)
        for _ in range(3 if calls == "more" else (i + 1) % 3 == 0):
            control.step()
    assert control.steps == reference[2].steps == STEPS
    assert tb.density(model) == pytest.approx(0.05, abs=1 / SIZE)
    if calls == "more":
        for p, q in zip(model.parameters(), reference[0].parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_control_that_is_made_in_mid_run_counts_from_there():
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.01), lr=2e-2)
    for i in range(7):
        learn(model, optimizer, i)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
    for i in range(STEPS):
        learn(model, optimizer, i)
        control.step()
        assert control.steps == i + 1
    assert tb.density(model) == pytest.approx(0.05, abs=1 / SIZE)


@pytest.mark.parametrize("at", [8, 9, 10, 11])
def test_a_control_that_is_made_in_a_coarse_phase_counts_all_weights(at):
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.01), lr=2e-2)
    levels = tb.Multilevel(model, optimizer, coarse_steps=3)
    for i in range(STEPS):
        if i == at:
            control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS - at)
            assert "3,700 of 3,700" in repr(control)
        learn(model, optimizer, i)
        if i >= at:
            control.step()
        levels.step()
    assert control.density == tb.density(model) == pytest.approx(0.05, abs=1 / SIZE)


# ---------------------------------------------------------------------- made anew on resume


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("mode", ["feedback", "exact"])
@pytest.mark.parametrize("at", [1, 23, 55])
def test_a_control_that_is_made_anew_goes_on(at, mode, order, tmp_path):
    straight = made(mode=mode)
    for i in range(STEPS):
        if i == at:
            torch.save([x.state_dict() for x in straight[:2]], tmp_path / "saved")
        learn(*straight[:2], i)
        straight[2].step()
    saved = torch.load(tmp_path / "saved", weights_only=True)
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-2)
    control = tb.TargetDensity(optimizer, 0.05, mode, STEPS) if order == "before" else None
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    control = control or tb.TargetDensity(optimizer, 0.05, mode, STEPS)
    for i in range(at, STEPS):
        learn(model, optimizer, i)
        control.step()
    assert control.steps == STEPS
    for p, q in zip(model.parameters(), straight[0].parameters(), strict=True):
        assert torch.equal(p, q)


def test_another_schedule_begins_at_its_beginning():
    model, optimizer, control = made()
    for i in range(STEPS):
        learn(model, optimizer, i)
        control.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for density, steps in ((0.05, 0), (0.03, 0)):  # the first had ended; the second asks for something else
        fresh = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-2)
        fresh.load_state_dict(saved)
        assert tb.TargetDensity(fresh, density, total_steps=STEPS).steps == steps


def test_the_newest_control_moves_lambda():
    """A cell of a notebook that is run twice."""
    model, optimizer, old = made()
    new = tb.TargetDensity(optimizer, 0.1, total_steps=STEPS)
    learn(model, optimizer, 0)
    with pytest.raises(RuntimeError, match="Another TargetDensity"):
        old.step()
    for i in range(STEPS):
        learn(model, optimizer, i)
        new.step()
    assert tb.density(model) == pytest.approx(0.1, abs=1 / SIZE)


# ---------------------------------------------------------------------- frozen, thawed, added


@pytest.mark.parametrize("mode", ["feedback", "exact"])
def test_what_is_frozen_stays_and_counts(mode):
    model, optimizer, control = made(0.1, mode=mode)
    for i in range(STEPS):
        if i == 20:
            model[2].requires_grad_(False)
            before = model[2].weight.clone()
        if i == 40:
            assert torch.equal(model[2].weight, before)
            model[2].requires_grad_(True)
        learn(model, optimizer, i)
        control.step()
    assert not torch.equal(model[2].weight, before)
    assert tb.density(model) == control.density == pytest.approx(0.1, abs=1 / SIZE)


def test_frozen_to_the_end():
    model, optimizer, control = made(0.1)
    for i in range(STEPS):
        if i == 20:
            model[0].requires_grad_(False)
            before = model[0].weight.clone()
        learn(model, optimizer, i)
        control.step()
    assert torch.equal(model[0].weight, before)
    assert tb.density(model) == pytest.approx(0.1, abs=1 / SIZE)


def test_frozen_weights_that_are_too_many_are_said():
    model, optimizer, control = made(0.05)
    for i in range(STEPS):
        if i == 20:
            with torch.no_grad():
                model[0].weight.fill_(1.0)
            model[0].requires_grad_(False)
        learn(model, optimizer, i)
        if i < STEPS - 1:
            control.step()
    with pytest.warns(UserWarning, match="3,200 weights are alive in layers that are frozen"):
        control.step()


@pytest.mark.parametrize(("multilevel", "at"), [(False, 20), (True, 20), (True, 21), (True, 22), (True, 23)])
def test_a_group_that_is_added_is_taken_in(multilevel, at):
    model, optimizer, control = made()
    levels = tb.Multilevel(model, optimizer, coarse_steps=3) if multilevel else None
    tail = nn.Linear(10, 40)
    tb.sparse_init_(tail, 0.02)
    whole = nn.Sequential(model, tail)
    for i in range(STEPS):
        if i == at:
            for group in tb.param_groups(tail, tb.L1()):
                optimizer.add_param_group(group)
        learn(model if i < at else whole, optimizer, i)
        control.step()
        if levels is not None:
            levels.step()
    assert tb.density(whole) == control.density == alive(model[0], model[2], tail)
    assert control.density == pytest.approx(0.05, abs=2 / (SIZE + 400))  # duals of the first steps may tie
    assert len({group["lam"] for group in optimizer.param_groups if group["regularizer"] != "none"}) == 1


# ---------------------------------------------------------------------- what counts


@pytest.mark.filterwarnings("ignore:.*start more than half dense")
def test_groups_without_a_weight_that_counts_follow():
    """A penalised vector: its λ would stay zero for ever."""
    model = nn.Sequential(nn.Linear(64, 50), nn.LayerNorm(50), nn.ReLU(), nn.Linear(50, 10))
    tb.sparse_init_(model, 0.02)
    optimizer = tb.AdaBreg(tb.param_groups(model, {"1.weight": tb.L1(), "*": tb.L1()}), lr=2e-2)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
    for i in range(STEPS):
        learn(model, optimizer, i)
        control.step()
    assert [g["lam"] for g in optimizer.param_groups if g["regularizer"] != "none"] == [control.lam] * 2
    assert control.lam > 0
    assert tb.density(model) == control.density == pytest.approx(0.05, abs=1 / SIZE)


@pytest.mark.filterwarnings("ignore:.*start more than half dense")
def test_one_denominator_for_an_optimizer_of_all_parameters():
    model = nn.Sequential(nn.Embedding(30, 8), nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    tb.sparse_init_(model, 0.02)
    optimizer = tb.AdaBreg(model.parameters(), lr=1e-2, regularizer=tb.L1())
    with pytest.warns(
        UserWarning, match=re.escape("penalises 1 matrices (240 entries) that tb.density does not count")
    ):
        control = tb.TargetDensity(optimizer, 0.05, total_steps=40)
    for i in range(40):
        optimizer.zero_grad()
        x, y = torch.randint(0, 30, (32, 8), generator=torch.Generator().manual_seed(i)), batch(i)[1]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        control.step()
    assert tb.density(model) == control.density == alive(model[2], model[4]) == pytest.approx(0.05, abs=1 / SIZE)
    assert "3,700 of 3,940 matrix entries are counted" in repr(control)


def test_what_never_had_a_gradient_is_said():
    model, optimizer, control = made(0.5)
    for i in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(i)
        x[:, 20:] = 0
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if i < STEPS - 1:
            control.step()
    with pytest.warns(UserWarning, match=r"`density` is 0.5.*never had a gradient"):
        control.step()


# ---------------------------------------------------------------------- to look at


def test_what_there_is_to_log():
    model, optimizer, control = made()
    assert repr(control) == (
        "TargetDensity(5 % asked, 2 % alive, λ = 0, step 0 of 60; 3,700 of 3,700 matrix entries are counted)"
    )
    for i in range(STEPS):
        learn(model, optimizer, i)
        control.step()
    assert control.to_dict() == {"density": 0.05, "target": 0.05, "lam": control.lam, "steps": STEPS}
    assert control.lam == optimizer.param_groups[0]["lam"]


class Wrapper(torch.optim.Optimizer):
    """As accelerate and Lightning do it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers_are_unwrapped():
    model = network()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-2)
    wrapped = Wrapper(Wrapper(optimizer))
    assert tb.TargetDensity(wrapped, 0.05).optimizer is optimizer
    assert tb.Multilevel(model, wrapped, coarse_steps=3).optimizer is optimizer
    assert optimizer.levels is not None
    model, other, _ = made()
    learn(model, other, 0)
    assert type(tb.shrink(model, (torch.randn(2, 64),), Wrapper(other)).optimizer) is tb.AdaBreg
