"""A regulariser of the user's own, in a file of its own: what follows from three methods, and what from its traits."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torch_bregman as tb


class ElasticNet(tb.Regularizer):
    """J = λ Σ (|θ| + α θ²/2), the three methods alone, with a prox that takes numbers only."""

    def __init__(self, alpha=1.0):
        self.alpha = alpha

    def value(self, weight, lam=1.0):
        return lam * (weight.abs() + self.alpha * weight.square() / 2).sum()

    def prox(self, x, step):
        return F.softshrink(x, step) / (1 + self.alpha * step)

    def subgradient(self, weight):
        return weight.sign() + self.alpha * weight


class WholeNorm(tb.Regularizer):
    """J = λ ‖θ‖₂: a weight is zero as a whole, and nothing is said about it."""

    def value(self, weight, lam=1.0):
        return lam * weight.norm()

    def prox(self, x, step):
        return x * max(0.0, 1 - step / max(float(x.norm()), 1e-30))

    def subgradient(self, weight):
        return weight / weight.norm().clamp_min(1e-30)


class Positive(tb.Regularizer):
    """J = λ Σ θ on θ ≥ 0, with the traits: entry by entry, in one pass, thresholds known."""

    homogeneous = True
    unit = "entry"

    def value(self, weight, lam=1.0):
        return lam * weight.sum()

    def prox(self, x, step):
        return (x - step).clamp_min(0)

    def subgradient(self, weight):
        return (weight > 0).to(weight.dtype)

    def thresholds(self, v):
        return v.clamp_min(0)

    def interval(self, lam):
        return -float("inf"), lam


class Rows(tb.Regularizer):
    """J = λ Σ_rows ‖θ_row‖₂, with the traits of a group norm written by hand."""

    homogeneous = True
    unit = "row"
    sums = True

    def spans(self, shape):
        return (1,)

    def coupled(self, mask):
        return mask.any(1, keepdim=True).expand_as(mask)

    def value(self, weight, lam=1.0):
        return lam * weight.norm(dim=1).sum()

    def prox(self, x, step):
        norm = x.norm(dim=1, keepdim=True)
        return x * ((norm - step).clamp_min(0) / norm.clamp_min(1e-30))

    def subgradient(self, weight):
        return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-30)

    def thresholds(self, v):
        return torch.where(v == 0, 0.0, v.norm(dim=1, keepdim=True))


X = torch.randn(96, 24, generator=torch.Generator().manual_seed(1))
Y = (X[:, :3].abs().argmax(1)).long()


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 3))
    return tb.sparse_init_(model, 0.1)


def make(kind, model, regularizer, **options):
    lr = {tb.LinBreg: 0.5, tb.AdaBreg: 1e-2, tb.ProxSGD: 0.1}[kind]
    return kind(tb.param_groups(model, regularizer, lam=0.02), lr=lr, **options)


def train(model, optimizer, steps, *also):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        for one in also:
            one.step()
    return loss.item()


def same(a, b):
    return all(p.equal(q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


ALL = [ElasticNet(0.5), WholeNorm(), Positive(), Rows()]
KINDS = [tb.LinBreg, tb.AdaBreg, tb.ProxSGD]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("regularizer", ALL, ids=repr)
def test_it_trains_saves_and_resumes(kind, regularizer):
    model = network()
    optimizer = make(kind, model, regularizer)
    before = F.cross_entropy(model(X), Y).item()
    assert train(model, optimizer, 30) < before
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network()
    again.load_state_dict(saved["model"])
    resumed = make(kind, again, copy.deepcopy(regularizer))
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 5)
    train(again, resumed, 5)
    assert same(model, again)


def test_another_one_is_told_by_its_arguments():
    state = make(tb.LinBreg, network(), ElasticNet(0.5)).state_dict()
    with pytest.raises(ValueError, match=r"ElasticNet\(alpha=0.5\) in group 0; here it is ElasticNet\(alpha=0.7\)"):
        make(tb.LinBreg, network(), ElasticNet(alpha=0.7)).load_state_dict(state)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("regularizer", ALL, ids=repr)
def test_one_by_one_or_together(kind, regularizer):
    one, other = network(), network()
    train(one, make(kind, one, regularizer, foreach=False), 10)
    train(other, make(kind, other, regularizer, foreach=True), 10)
    assert same(one, other)


@pytest.mark.parametrize("mode", ["exact", "feedback"])
@pytest.mark.parametrize("kind", [tb.LinBreg, tb.AdaBreg], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("regularizer", [ElasticNet(0.5), ElasticNet(0.0), Positive()], ids=repr)
def test_the_density_is_met(regularizer, kind, mode):
    model = network()
    optimizer = make(kind, model, regularizer)
    train(model, optimizer, 60, tb.TargetDensity(optimizer, 0.3, mode, total_steps=60))
    assert tb.density(model) == pytest.approx(0.3, abs=1 / 1296)


def test_the_density_is_met_without_a_dual():
    model = network()
    optimizer = make(tb.ProxSGD, model, ElasticNet())
    train(model, optimizer, 60, tb.TargetDensity(optimizer, 0.05, total_steps=60))
    assert tb.density(model) <= 0.05 + 1 / 1296


def test_a_trial_finds_what_the_formula_says():
    v = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert ElasticNet().lambda_max(v) == pytest.approx(float(v.abs().max()), rel=1e-6)
    assert WholeNorm().lambda_max(v) == pytest.approx(float(v.norm()), rel=1e-6)
    assert ElasticNet().lambda_max(torch.zeros(3)) == 0


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("regularizer", ALL, ids=repr)
def test_fused_is_the_readable_step(kind, regularizer):
    pytest.importorskip("numba")
    one, other = network(), network()
    train(one, make(kind, one, regularizer, fused=False), 10)
    train(other, make(kind, other, regularizer, fused=True), 10)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


class Halved(tb.L1):
    """A prox of its own on top of a class that says more: nothing of that holds for it."""

    def prox(self, x, step):
        return super().prox(x, step / 2)


def test_a_prox_of_its_own_claims_nothing_of_its_parent():
    pytest.importorskip("numba")
    assert tb.L1().by_magnitude
    assert not Halved().by_magnitude
    assert Halved().interval(1.0) is None
    one, other = network(), network()
    train(one, make(tb.LinBreg, one, Halved(), fused=False), 10)
    train(other, make(tb.LinBreg, other, Halved(), fused=True), 10)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    model = network()
    optimizer = make(tb.LinBreg, model, Halved())
    train(model, optimizer, 60, tb.TargetDensity(optimizer, 0.3, "exact", total_steps=60))
    assert tb.density(model) == pytest.approx(0.3, abs=1 / 1296)


@pytest.mark.parametrize("kind", [tb.LinBreg, tb.AdaBreg], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("regularizer", ALL, ids=repr)
def test_multilevel(kind, regularizer):
    """The traits let the live part be trained alone; without them the weight is trained as ever, and nothing fails."""
    model = tb.sparse_init_(network(), 0.3, groups="rows" if regularizer.outputs else None)
    optimizer = make(kind, model, regularizer)
    if regularizer.outputs:  # Adam's first step would carry every row over a small threshold
        optimizer.param_groups[0]["lam"] = 0.3
    before = F.cross_entropy(model(X), Y).item()
    levels = tb.Multilevel(model, optimizer, coarse_steps=4)
    live = []
    for _ in range(20):
        after = train(model, optimizer, 1, levels)
        if levels.restricted:
            live.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"]))
    levels.leave()
    assert bool(live) == (regularizer.spans(model[0].weight.shape) is not None)
    assert all(size < sum(p.numel() for p in model.parameters()) for size in live)
    assert after < before


def test_shrink_takes_the_optimizer_along():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 3))
    tb.sparse_init_(model, 0.25, groups="rows")
    with torch.no_grad():
        model[0].bias.zero_()
    optimizer = tb.LinBreg(tb.param_groups(model, {"0": Rows(), "2": Positive()}, lam=0.05), lr=0.1)
    train(model, optimizer, 5)
    small = tb.shrink(model, (X,), optimizer)
    assert small.model[0].out_features < 48
    assert "goes on with what is left of" in str(small.report)  # it does not say what it is on a part
    train(small.model, small.optimizer, 3)
