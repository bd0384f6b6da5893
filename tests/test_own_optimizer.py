"""An optimizer of the user's own, in a file of its own: one class with `_descend`, and what follows from it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.optim import BregmanOptimizer
from torch_bregman.optim.onepass import plans
from torch_bregman.optim.onepass.rule import Rule


class SignBreg(BregmanOptimizer):
    """v ← v − τ sign(g), `_descend` alone."""

    def _descend(self, duals, grads, states, group):
        torch._foreach_add_(duals, torch._foreach_sign(grads), alpha=-group["lr"])


class Heavy(BregmanOptimizer):
    """v ← v − τ m, m ← β m + g, with an option and state of its own."""

    def __init__(self, params, lr=0.1, beta=0.9, *, regularizer=None, lam=0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "lam": lam}, regularizer)

    def _descend(self, duals, grads, states, group):
        for dual, grad, state in zip(duals, grads, states, strict=True):
            if "mean" not in state:
                state["mean"] = torch.zeros_like(grad)
            state["mean"].mul_(group["beta"]).add_(grad)
            dual.sub_(state["mean"], alpha=group["lr"])


class Ruled(SignBreg):
    """Plain descent, with the rule for one pass over memory."""

    def _descend(self, duals, grads, states, group):
        torch._foreach_add_(duals, grads, alpha=-group["lr"])

    def _rule(self, group):
        return Rule("PLAIN", numbers={"LR": group["lr"], "BETA1": 0.0})


X = torch.randn(96, 24, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].abs().argmax(1)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return tb.sparse_init_(nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 3)), 0.1).to(dtype)


def make(kind, model, **options):
    lr = 0.01 if kind is SignBreg else 0.1
    return kind(tb.param_groups(model, tb.L1(), lam=0.05), lr=lr, **options)


def train(model, optimizer, steps, *also):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X.to(model[0].weight)).float(), Y)
        loss.backward()
        optimizer.step()
        for one in also:
            one.step()
    return loss.item()


def same(a, b):
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SignBreg, Heavy, Ruled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_and_resumes(kind, dtype):
    model = network(dtype)
    optimizer = make(kind, model)
    before = F.cross_entropy(model(X.to(dtype)).float(), Y).item()
    assert train(model, optimizer, 40) < before
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(dtype)
    again.load_state_dict(saved["model"])
    resumed = make(kind, again)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.state[again[0].weight]["dual"].dtype == torch.float32
    train(model, optimizer, 5)
    train(again, resumed, 5)
    assert same(model, again)


@pytest.mark.parametrize("kind", [SignBreg, Heavy, Ruled])
def test_it_follows_its_equation_and_edits(kind):
    """With λ = 0 it is descent on θ itself, also after θ was changed from outside."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 4))
    optimizer = kind([p], lr=0.1)
    theta, mean = p.detach().clone(), torch.zeros_like(p)
    for step in range(6):
        p.grad = torch.randn_like(p)
        mean = 0.9 * mean + p.grad
        direction = {SignBreg: p.grad.sign(), Heavy: mean, Ruled: p.grad}[kind]
        theta = theta - 0.1 * direction
        optimizer.step()
        torch.testing.assert_close(p.detach(), theta)
        if step == 2:
            with torch.no_grad():
                p.mul_(2)
            theta = theta * 2


@pytest.mark.parametrize("kind", [Heavy, Ruled])  # steps of one size leave equal |v|, which are all in or all out
def test_the_density_is_met_also_on_the_live_weights(kind):
    model = network()
    optimizer = make(kind, model)
    levels = tb.Multilevel(model, optimizer, coarse_steps=3)
    control = tb.TargetDensity(optimizer, 0.2, total_steps=60)
    train(model, optimizer, 60, control, levels)
    assert levels.counts["coarse"] > 20
    assert tb.density(model) == pytest.approx(0.2, abs=1 / 1296)


@pytest.mark.parametrize("kind", [SignBreg, Heavy])
def test_a_thousand_million_entries_later_it_still_takes_the_plain_step(kind):
    """LinBreg would have gone over to one pass by then; a method without a rule for it goes on as it is."""
    early, late = network(), network()
    one, other = make(kind, early), make(kind, late)
    for group in other.param_groups:
        group["entries_updated"] = 10 * plans.EARNED
    train(early, one, 5)
    train(late, other, 5)
    assert same(early, late)


def test_with_a_rule_one_pass_does_the_same():
    pytest.importorskip("numba")
    one, other = network(), network()
    train(one, make(Ruled, one, fused=False), 10)
    train(other, make(Ruled, other, fused=True), 10)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


class Signed(tb.LinBreg):
    """An equation of its own on top of a class that has a rule for another one."""

    def _descend(self, duals, grads, states, group):
        torch._foreach_add_(duals, torch._foreach_sign(grads), alpha=-group["lr"])


def test_an_equation_of_its_own_does_not_run_by_the_rule_of_its_parent():
    early, late = network(), network()
    one, other = make(Signed, early), make(Signed, late)
    for group in other.param_groups:
        group["entries_updated"] = 10 * plans.EARNED
    train(early, one, 5)
    train(late, other, 5)
    assert same(early, late)
    with pytest.raises(ValueError, match="Signed has no rule for one pass over memory"):
        make(Signed, network(), fused=True)


def test_what_is_refused():
    with pytest.raises(ValueError, match="`fused`: True; SignBreg has no rule for one pass over memory"):
        make(SignBreg, network(), fused=True)
    with pytest.raises(TypeError, match="Invalid option `momentum`; expected one of lr, lam, delta"):
        make(SignBreg, network(), momentum=0.9)
    with pytest.raises(ValueError, match="Invalid `lr`: -1"):
        SignBreg(network().parameters(), lr=-1)
    with pytest.raises(ValueError, match="no such parameter"):
        make(SignBreg, network()).write(nn.Parameter(torch.zeros(2)))


def test_a_copy_goes_on():
    model = network()
    optimizer = make(Heavy, model)
    train(model, optimizer, 3)
    both, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3)
    train(both, other, 3)
    assert same(model, both)


@pytest.mark.parametrize("kind", [tb.LinBreg, tb.AdaBreg, SignBreg])
def test_following_and_writing_one_parameter(kind):
    p = nn.Parameter(torch.tensor([[0.0, 1.0, -2.0, 0.0, 0.0]]))
    optimizer = kind([p], lr=0.1, regularizer=tb.L1(), lam=0.5)
    p.grad = torch.full_like(p, 0.1)
    optimizer.step()
    dual = optimizer.state[p]["dual"]
    with torch.no_grad():
        p[0, 1] = 3.0
    optimizer.follow(p)
    assert dual[0, 1] == 3.5  # θ/δ + λ
    dual[0, 0] = 0.75
    optimizer.write(p)
    torch.testing.assert_close(p[0, 0], torch.tensor(0.25))
