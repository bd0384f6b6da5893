"""The rivals: each against a few lines that say what it is, and in a run from the command line's recipe."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from cases import pairwise
from safetensors.torch import load_file
from torch import nn

import torch_bregman as tb
from torch_bregman import rivals
from torch_bregman.report import write_report
from torch_bregman.rivals import SET, GradualMagnitudePruning, Lasso, RigL, erk, training_flops, uniform
from torch_bregman.train import Recipe, fit
from torch_bregman.train.checksummed import load_checkpoint
from torch_bregman.train.errors import Stopped

NAMES = ("gmp", "set", "rigl", "lasso")


def mlp(seed=0, sizes=(12, 30, 20, 4)):
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convnet(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    return net.to(memory_format=torch.channels_last)


def tied(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    net[2].weight = net[0].weight
    return net


def make(kind, model, density, total, optimizer, **options):
    if kind == "gmp":
        return GradualMagnitudePruning(model, density, total, **options)
    if kind == "lasso":
        return Lasso(model, density, total, lam=1e-3, **options)
    return {"set": SET, "rigl": RigL}[kind](model, density, total, optimizer, **options)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def train(model, optimizer, rival, steps, seed=1, before=lambda: None, after=lambda: None):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 6, 6) if isinstance(model[0], nn.Conv2d) else (12,)
    for _ in range(steps):
        x = torch.randn(32, *shape, generator=generator)
        x[:, ..., 0] = 0.0  # a feature that never says anything, so that some gradients are exactly zero
        y = x.flatten(1)[:, 1:5].argmax(1)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        (loss + rival.penalty() if isinstance(rival, Lasso) else loss).backward()
        optimizer.step()
        before()
        rival.step()
        after()


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


# ---------------------------------------------------------------------- the density


@pairwise({"kind": NAMES, "net": [mlp, convnet, tied], "density": [0.01, 0.1, 0.37, 0.9]})
def test_the_final_density_is_exact(kind, net, density):
    model = net()
    size = sum(w.numel() for w in {id(w): w for w in weights(model)}.values())
    optimizer = adam(model)
    rival = make(kind, model, density, 40, optimizer)
    train(model, optimizer, rival, 40)
    kept = round(density * size)
    assert tb.density(model) == kept / size
    assert sum(rival.alive.values()) == sum(int(m.sum()) for m in rival.masks.values()) == kept
    train(model, optimizer, rival, 5)  # whoever trains on keeps it
    assert tb.density(model) == kept / size


@pytest.mark.parametrize("base", [adam, lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9)])
@pytest.mark.parametrize("kind", ["gmp", "set", "rigl"])
def test_masks_hold_between_updates(kind, base):
    model = mlp()
    optimizer = base(model)
    rival = make(kind, model, 0.2, 80, optimizer, every=10)
    old, changes = {}, []

    def after():
        for name, weight in rival.weights.items():
            assert torch.equal(weight != 0, rival.masks[name])  # also right after weights came
        if rival.steps > 1 and any(not torch.equal(old[n], m) for n, m in rival.masks.items()):
            changes.append(rival.steps)
        old.update({n: m.clone() for n, m in rival.masks.items()})

    train(model, optimizer, rival, 80, after=after)
    assert changes == [10, 20, 30, 40, 50, *([60] if kind == "gmp" else [])]  # T_end itself moves nothing


@pytest.mark.parametrize("kind", ["set", "rigl"])
def test_sparse_ones_keep_the_count_of_every_layer(kind):
    model = convnet()
    optimizer = adam(model)
    rival = make(kind, model, 0.15, 60, optimizer, every=5)
    counts = [int(m.sum()) for m in rival.masks.values()]
    assert counts == erk([w.shape for w in weights(model)], round(0.15 * sum(w.numel() for w in weights(model))))

    def after():
        assert [int(w.count_nonzero()) for w in rival.weights.values()] == counts

    train(model, optimizer, rival, 60, after=after)


# ---------------------------------------------------------------------- how many weights each layer gets


def plain_erk(shapes, kept):
    """ε by bisection on Σ min(ε · sum, size) = kept."""
    low, high = 0.0, 1e6
    for _ in range(200):
        eps = (low + high) / 2
        total = sum(min(eps * sum(s), math.prod(s)) for s in shapes)
        low, high = (eps, high) if total < kept else (low, eps)
    return [min(low * sum(s), math.prod(s)) for s in shapes]


SHAPES = {
    "paper mlp": [(300, 784), (100, 300), (10, 100)],
    "convs": [(16, 3, 3, 3), (64, 16, 3, 3), (64, 64, 3, 3), (10, 64)],
    "tiny": [(3, 4), (2, 3), (50, 60)],
    "one": [(20, 30)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("density", [0.01, 0.05, 0.3, 0.8, 0.999])
def test_erk_is_the_formula_and_its_total_exact(shapes, density):
    sizes = [math.prod(s) for s in shapes]
    kept = round(density * sum(sizes))
    counts = erk(shapes, kept)
    assert sum(counts) == kept
    wanted = plain_erk(shapes, kept)
    for count, want, size in zip(counts, wanted, sizes, strict=True):
        assert 1 <= count <= size
        assert abs(count - want) < 1 + 1e-6 or count == 1
        if want == size:
            assert count == size  # a layer that would be fuller than full is dense


def test_erk_by_hand():
    # 10 × 10 and 20 × 20: the sums are 20 and 40, so 90 weights go 30 to 60.
    assert erk([(10, 10), (20, 20)], 90) == [30, 60]
    # 2 × 2 would get 4/104 of 300, 11.5 weights: it is dense, and the other gets the rest.
    assert erk([(2, 2), (50, 50)], 300) == [4, 296]
    # A kernel's sides count: 4 + 4 + 3 + 3 = 14 and 4 + 10 = 14.
    assert erk([(4, 4, 3, 3), (4, 10)], 30) == [15, 15]


def test_uniform_rounds_to_the_total():
    assert uniform([(10, 10), (20, 20)], 50) == [10, 40]
    assert uniform([(3, 3), (3, 3), (3, 3)], 4) in ([2, 1, 1], [1, 2, 1], [1, 1, 2])
    assert uniform([(2, 3), (100, 100)], 100) == [1, 99]  # no layer is cut off
    assert sum(uniform([(3, 3), (4, 4), (5, 5)], 2)) == 2  # too few for all
    model = mlp()
    rival = SET(model, 0.1, 10, adam(model), distribution="uniform")
    assert list(rival.alive.values()) == [36, 60, 8]


# ---------------------------------------------------------------------- each against its definition


def test_gmp_is_the_cubic_schedule_of_global_magnitudes():
    model, size = mlp(), 1040
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rival = GradualMagnitudePruning(model, 0.05, 100, start=0.1, end=0.7, every=7)
    seen, flat = {}, lambda: torch.cat([w.detach().flatten() for w in weights(model)])
    state = {}

    def before():
        state["before"] = flat()

    def after():
        t, now = rival.steps, flat()
        seen[t] = int(now.count_nonzero())
        if t in (14, 49, 70):  # what is left are the largest that were alive
            w = np.where(state["alive"], np.abs(state["before"].numpy()), -1)
            assert set(np.argsort(-w, kind="stable")[: seen[t]]) == set(now.numpy().nonzero()[0])
        state["alive"] = now.numpy() != 0

    train(model, optimizer, rival, 100, before=before, after=after)
    final = round(0.05 * size)
    kept = size
    for t in range(1, 101):
        if 10 < t <= 70 and (t % 7 == 0 or t == 70):
            sparsity = (1 - final / size) * (1 - (1 - (t - 10) / 60) ** 3)
            kept = round((1 - sparsity) * size)
        assert abs(seen[t] - kept) <= 1, t
    assert seen[70] == seen[100] == final


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    model = mlp()
    optimizer = adam(model)
    rival = RigL(model, 0.3, 100, optimizer, alpha=0.4, every=20)
    old, checked = {}, []

    def before():
        for name, w in rival.weights.items():
            mask = rival.masks[name].flatten().numpy()
            old[name] = (mask.copy(), np.where(mask, w.detach().flatten().numpy(), 0), w.grad.abs().flatten().numpy())

    def after():
        if rival.steps not in (20, 40, 60):
            return
        for name, w in rival.weights.items():
            mask, value, grad = old[name]
            moved = math.floor(0.4 / 2 * (1 + math.cos(math.pi * rival.steps / 75)) * mask.sum())
            active = mask.nonzero()[0]
            left = set(active[np.argsort(np.abs(value[active]))[moved:]])
            others = np.array([i for i in range(mask.size) if i not in left])
            now = set(rival.masks[name].flatten().numpy().nonzero()[0])
            grown = now - left
            assert left <= now
            assert len(grown) == moved
            # Some gradients are zero and so equal, behind units that are dead: compare values, not places.
            assert np.array_equal(np.sort(-grad[list(grown)]), np.sort(-grad[others])[:moved])
            new = sorted(grown - set(active))
            assert len(new) > 0
            assert (w.detach().flatten()[new].abs() <= 1e-20).all()
            for moment in ("exp_avg", "exp_avg_sq"):
                assert (optimizer.state[w][moment].flatten()[new] == 0).all()
                assert (optimizer.state[w][moment].flatten()[sorted(left)] != 0).any()
            kept = sorted(left)
            assert np.array_equal(w.detach().flatten().numpy()[kept], value[kept])
            checked.append(name)

    train(model, optimizer, rival, 80, before=before, after=after)
    assert len(checked) == 9
    assert rival.dense_gradients == 3


def test_set_drops_the_smallest_and_grows_at_random():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    rival = SET(model, 0.2, 1000, optimizer, zeta=0.5, every=4)
    hits = {name: torch.zeros(mask.shape) for name, mask in rival.masks.items()}
    old = {}

    def before():
        old.update({n: (rival.masks[n].clone(), w.detach().abs() * rival.masks[n]) for n, w in rival.weights.items()})

    def after():
        if rival.steps % 4:
            return
        for name, mask in rival.masks.items():
            was, size = old[name]
            left = int(was.sum()) - int(0.5 * was.sum())
            assert (mask & was & (size >= size.flatten().sort(descending=True).values[left - 1])).sum() == left
            new = mask & ~was
            assert (optimizer.state[rival.weights[name]]["momentum_buffer"][new] == 0).all()
            hits[name] += new

    train(model, optimizer, rival, 400, before=before, after=after)
    # Every place where a weight was missing was tried, also those that never have a gradient.
    assert all(((h > 0) | rival.masks[n]).float().mean() > 0.95 for n, h in hits.items())


def test_lasso_is_the_subgradient_and_then_a_cut():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(40, 6), torch.randn(40, 3)
    with torch.no_grad():
        model.weight[0, 0] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    rival = Lasso(model, 0.5, 10, lam=0.2)
    w, b = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    for _ in range(10):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum() / 40 + rival.penalty()).backward()
        optimizer.step()
        rival.step()
        gap = (x.double().numpy() @ w.T + b - y.double().numpy()) / 40
        w, b = w - 0.05 * (gap.T @ x.double().numpy() + 0.2 * np.sign(w)), b - 0.05 * gap.sum(0)
    w[np.abs(w) < np.sort(np.abs(w), axis=None)[9]] = 0
    np.testing.assert_allclose(model.weight.detach().numpy(), w, atol=1e-5)
    assert np.array_equal(model.weight.detach().numpy() != 0, w != 0)


def test_flops_are_the_published_formulas():
    forward, density = {"a": 100.0, "b": 50.0}, {"a": 0.1, "b": 0.4}
    sparse, dense = 100 * 0.1 + 50 * 0.4, 150.0
    assert training_flops(forward, {}, 7) == 7 * 3 * dense
    assert training_flops(forward, density, 7) == pytest.approx(7 * 3 * sparse)
    for every in (10, 100):
        published = (3 * sparse * every + 2 * sparse + dense) / (every + 1)
        assert training_flops(forward, density, every + 1, 1) / (every + 1) == pytest.approx(published)
    with pytest.raises(ValueError, match="lacks the FLOPs of b"):
        training_flops({"a": 1.0}, density, 3)


def test_flops_of_a_run_are_those_of_its_masks():
    for kind in NAMES:
        model = mlp()
        optimizer = adam(model)
        rival = make(kind, model, 0.1, 60, optimizer)
        forward = {name: 2.0 * w.numel() for name, w in rival.weights.items()} | {"norm": 10.0}
        total, alive = [0.0], {n: int(m.sum()) for n, m in rival.masks.items()}

        def after(rival=rival, kind=kind, total=total, alive=alive):
            sparse = 10 + sum(2.0 * count for count in alive.values())
            moved = kind == "rigl" and rival.steps % rival.every == 0 and rival.steps < 45
            total[0] += 2 * sparse + 10 + 2 * 1040 if moved else 3 * sparse
            alive.update({n: int(m.sum()) for n, m in rival.masks.items()})

        train(model, optimizer, rival, 60, after=after)
        assert rival.flops(forward) == pytest.approx(total[0])
        assert (rival.flops(forward) == 60 * 3 * (2 * 1040 + 10)) == (kind == "lasso")


@pytest.mark.parametrize("kind", NAMES)
def test_state_goes_through_a_file(kind, tmp_path):
    whole, ends = mlp(), []
    optimizer = adam(whole)
    rival = make(kind, whole, 0.1, 60, optimizer, **({} if kind == "lasso" else {"every": 4}))
    train(whole, optimizer, rival, 22)
    torch.save([whole.state_dict(), optimizer.state_dict(), rival.state_dict()], tmp_path / "s.pt")
    for again in (False, True):
        if again:
            model = mlp(seed=5)
            optimizer = adam(model)
            rival = make(kind, model, 0.1, 60, optimizer, **({} if kind == "lasso" else {"every": 4}))
            states = torch.load(tmp_path / "s.pt", weights_only=True)
            for part, state in zip((model, optimizer, rival), states, strict=True):
                part.load_state_dict(state)
        train(model if again else whole, optimizer, rival, 38, seed=2)
        ends.append([rival.flops(dict.fromkeys(rival.weights, 1.0)), *weights(model if again else whole)])
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1:], ends[1][1:], strict=True))
    with pytest.raises(ValueError, match="`state_dict` is of layers"):
        Lasso(mlp(sizes=(12, 5, 4)), 0.1, 60, lam=0.0).load_state_dict(rival.state_dict())


# ---------------------------------------------------------------------- runs


def recipe(name, **options):
    return Recipe(dataset="digits", **{"epochs": 6, "density": 0.1, "optimizer": name, "lr": 1e-2, **options}).check()


@pytest.mark.parametrize("name", NAMES)
def test_a_run_reaches_its_density_learns_and_resumes_bit_for_bit(name, tmp_path, stop_after):
    end = fit(recipe(name), tmp_path / "whole", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert end["kept"] == round(0.1 * end["weights"])
    assert rows[-2]["on_target"]
    assert all(row["lam"] is None for row in rows)
    starts = {"gmp": 1.0, "lasso": 1.0}
    assert rows[0]["density"] == starts.get(name, 0.1)
    if name in ("set", "rigl"):
        assert all(row["density"] == 0.1 for row in rows)
    assert end["test_accuracy"] > (0.2 if name == "lasso" else 0.85)  # six epochs are not enough for Lasso's cut
    assert "asked" in write_report(tmp_path / "whole").read_text()

    stop_after(rivals.Rival, 4, 30)
    for _ in range(2):
        with pytest.raises(Stopped, match="Stopped at epoch"):
            fit(recipe(name), tmp_path / "parts", quiet=True)
        assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["rival"]["steps"] in (4, 30)
    again = fit(recipe(name), tmp_path / "parts", quiet=True)
    a, b = (load_file(tmp_path / part / "last.safetensors") for part in ("whole", "parts"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert again["test_accuracy"] == end["test_accuracy"]


@pytest.mark.parametrize(
    "options",
    [{"model": "convnet", "limit": 300}, {"schedule": "plateau"}, {"precision": "bf16"}, {"weight_decay": 1e-3}],
    ids=str,
)
@pytest.mark.parametrize("name", ["rigl", "lasso"])
def test_other_options_go_along(name, options, tmp_path):
    end = fit(recipe(name, epochs=2, **options), tmp_path, quiet=True)
    assert end["kept"] == round(0.1 * end["weights"])


def test_seeds_decide_the_masks(tmp_path):
    ends = {}
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(recipe("set", epochs=1, seed=seed), tmp_path / run, quiet=True)
        ends[run] = load_file(tmp_path / run / "last.safetensors")["1.weight"]
    assert torch.equal(ends["a"], ends["b"])
    assert not torch.equal(ends["a"] != 0, ends["c"] != 0)


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 5.0}, r"`density`: 5.0; .*for 5 % write 0.05"),
        ({"lam": 0.1}, r"`lam`: 0.1; rigl has no λ"),
        ({"optimizer": "lasso", "density": None, "lam": 0.1}, r"`density`: None; lasso"),
        ({"regularizer": "group-l1"}, r"`regularizer`: 'group-l1'; rigl leaves single weights"),
        ({"multilevel": True}, r"`multilevel`: True; rigl has no dual"),
        ({"optimizer": "rigll"}, r"did you mean 'rigl'"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"optimizer": "rigl", "density": 0.1, **options}).check()


def test_recipes_that_leave_things_open():
    assert Recipe(optimizer="gmp").check().density == 0.05
    filled = Recipe(optimizer="lasso", density=0.1).check()
    assert (filled.lr, filled.eps, filled.lam) == (1e-3, 1e-8, 1e-3)
    assert filled.twin().optimizer == "adam"
    assert filled.twin().density is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m, o: GradualMagnitudePruning(m, 0.0, 10), r"`density`: 0.0"),
        (lambda m, o: GradualMagnitudePruning(m, 0.1, 0), r"`total_steps`: 0; expected a whole number"),
        (lambda m, o: GradualMagnitudePruning(m, 0.1, 10, every=0), r"`every`: 0; expected a whole number"),
        (lambda m, o: GradualMagnitudePruning(m, 0.1, 10, start=0.8), r"`start`: 0.8; expected .* < 0.75"),
        (lambda m, o: GradualMagnitudePruning(m, 0.1, 10, end=1.5), r"`end`: 1.5; expected a share"),
        (lambda m, o: GradualMagnitudePruning(nn.ReLU(), 0.1, 10), r"no Linear or Conv weights"),
        (lambda m, o: SET(m, 0.1, 10, o, zeta=1.0), r"`zeta`: 1.0"),
        (lambda m, o: SET(m, 0.1, 10, o, distribution="erdos"), r"`distribution`: 'erdos'; expected one of 'erk'"),
        (lambda m, o: RigL(m, 0.1, 10, o, alpha=0.0), r"`alpha`: 0.0"),
        (lambda m, o: RigL(m, 0.1, 10, m), r"`optimizer`: Sequential"),
        (lambda m, o: Lasso(m, 0.1, 10, lam=-1.0), r"`lam`: -1.0"),
    ],
)
def test_bad_input_is_named(build, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        build(model, adam(model))


def test_rigl_without_gradients_says_when_to_step():
    model = mlp()
    rival = RigL(model, 0.1, 10, adam(model), every=1)
    with pytest.raises(ValueError, match=r"0\.weight has no gradient; RigL's step\(\) comes after backward"):
        rival.step()
