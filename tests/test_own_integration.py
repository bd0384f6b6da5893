"""Somebody else's training loop: one class of the user's own connects it, with public names alone."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_bregman as tb


class Trainer:
    """Stands for a framework: it owns the loop, the optimizer's calls and the checkpoint, and tells its callbacks."""

    def __init__(self, model, optimizer, callbacks, clip=1.0):
        self.model, self.optimizer, self.callbacks, self.clip = model, optimizer, callbacks, clip
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
        self.steps = 0

    def fit(self, x, y, steps):
        for _ in range(steps):
            batch = torch.randperm(len(x), generator=torch.Generator().manual_seed(self.steps))[:32]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x[batch]), y[batch]).backward()
            nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.clip)
            self.optimizer.step()
            self.schedule.step()
            self.steps += 1
            for callback in self.callbacks:
                callback.on_step_end(self)

    def save(self):
        file = io.BytesIO()
        state = {
            "steps": self.steps,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }
        torch.save(state, file)
        file.seek(0)
        return file

    def load(self, file):
        state = torch.load(file, weights_only=True)
        self.steps = state["steps"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for callback, its in zip(self.callbacks, state["callbacks"], strict=True):
            callback.load_state_dict(its)


class BregmanCallback:
    """The integration: the density that was asked for, and training on the live weights."""

    def __init__(self, model, optimizer, density, total_steps):
        self.control = tb.TargetDensity(optimizer, density, total_steps=total_steps)
        self.levels = tb.Multilevel(model, optimizer, coarse_steps=3)

    def on_step_end(self, trainer):
        self.control.step()
        self.levels.step()

    def state_dict(self):
        return {"control": self.control.state_dict(), "levels": self.levels.state_dict()}

    def load_state_dict(self, state):
        self.control.load_state_dict(state["control"])
        self.levels.load_state_dict(state["levels"])


X = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    tb.sparse_init_(model, 0.05)
    optimizer = tb.AdaBreg(tb.param_groups(model), lr=2e-2)
    return Trainer(model, optimizer, [BregmanCallback(model, optimizer, 0.1, total_steps=80)])


def test_asked_and_got():
    trainer = make()
    trainer.fit(X, Y, 80)
    assert tb.density(trainer.model) == pytest.approx(0.1, abs=1 / 1536)
    assert (trainer.model(X).argmax(1) == Y).float().mean() > 0.7


@pytest.mark.parametrize("stop", [20, 22])  # a fine step, and in the middle of a coarse phase
def test_a_stopped_run_goes_on_bit_for_bit(stop):
    whole, first = make(), make()
    whole.fit(X, Y, 80)
    first.fit(X, Y, stop)
    again = make()
    again.load(first.save())
    again.fit(X, Y, 80 - stop)
    for p, q in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert p.equal(q)
