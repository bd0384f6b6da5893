"""TargetDensity: asked 5 %, got 5.0 %."""

import copy
import itertools

import pytest
import torch
from cases import FLOATS, pairwise
from torch import nn

import torch_bregman as tb
from torch_bregman.control import threshold_for

STEPS = 150


def make(optimizer="adabreg", regularizer=None, lam=0.0, seed=0, model=None, start=0.02, **options):
    torch.manual_seed(seed)
    if model is None:
        model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 5))
    tb.sparse_init_(model, start, generator=torch.Generator().manual_seed(seed))
    groups = tb.param_groups(model, regularizer or tb.L1(), lam)
    if optimizer == "linbreg":
        return model, tb.LinBreg(groups, lr=0.1, **options)
    if optimizer == "momentum":
        return model, tb.LinBreg(groups, lr=0.1, momentum=0.9, **options)
    return model, tb.AdaBreg(groups, lr=1e-2, **options)


def train(model, optimizer, control, steps, seed=1, shape=(30,), after=lambda k: None):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 30, generator=torch.Generator().manual_seed(7))
    for k in range(steps):
        x = torch.randn(64, *shape, generator=generator)
        y = (x.flatten(1)[:, :30] @ teacher.T).argmax(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if control is not None:
            control.step()
        after(k)


def kept(model):
    return sum(int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))


@pairwise(
    {
        "optimizer": ["adabreg", "linbreg", "momentum"],
        "density": [0.3, 0.05, 0.013],
        "mode": ["feedback", "exact"],
    }
)
def test_the_last_step_lands_on_the_very_weight(optimizer, density, mode):
    model, optim = make(optimizer)
    train(model, optim, tb.TargetDensity(optim, density, mode, total_steps=STEPS), STEPS)
    assert kept(model) == round(density * 4400)
    assert tb.density(model) == kept(model) / 4400


@pytest.mark.parametrize("delta", [0.3, 2.5])
def test_delta_does_not_move_the_target(delta):
    model, optim = make("adabreg", delta=delta)
    train(model, optim, tb.TargetDensity(optim, 0.07, "exact"), 40)
    assert kept(model) == round(0.07 * 4400)


def test_exact_mode_is_exact_after_every_step():
    model, optim = make("linbreg")
    control = tb.TargetDensity(optim, 0.1, "exact")
    seen = []
    train(model, optim, control, 60, after=lambda k: seen.append(kept(model)))
    assert set(seen) == {440}


def test_feedback_follows_without_knowing_the_end():
    model, optim = make("adabreg")
    control = tb.TargetDensity(optim, 0.1, every=5)
    train(model, optim, control, 600)
    assert abs(tb.density(model) / 0.1 - 1) < 0.15
    control.land()
    assert kept(model) == 440


@pytest.mark.parametrize("too_dense", [True, False])
def test_feedback_moves_lam_towards_the_target_and_never_past_it(too_dense):
    model, optim = make("adabreg", lam=0.3, start=0.2)
    train(model, optim, None, 30)
    assert 0.1 < tb.density(model) < 0.6
    target = tb.density(model) * (0.5 if too_dense else 1.4)
    control = tb.TargetDensity(optim, target, every=1, gain=1e6)
    before = optim.param_groups[0]["lam"]
    control.step()
    after = optim.param_groups[0]["lam"]
    assert (after > before) == too_dense
    optim.refresh()
    assert kept(model) == round(target * 4400)  # so great a gain would go far beyond


def test_v_is_left_alone_when_lam_moves():
    model, optim = make("adabreg")
    control = tb.TargetDensity(optim, 0.1, "exact")
    train(model, optim, control, 20)
    before = [optim.state[p]["dual"].clone() for p in optim.param_groups[0]["params"]]
    control = tb.TargetDensity(optim, 0.2, "exact")
    control.land()
    for p, dual in zip(optim.param_groups[0]["params"], before, strict=True):
        assert torch.equal(optim.state[p]["dual"], dual)
    assert kept(model) == 880


@pytest.mark.parametrize(
    ("regularizer", "shape"),
    [(tb.GroupL1("rows"), (30,)), (tb.GroupL1("columns"), (30,)), (tb.SparseGroupL1("rows"), (30,)),
     (tb.NonNegativeL1(), (30,))],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_regularisers_come_as_near_as_their_groups_allow(regularizer, shape):
    model, optim = make("adabreg", regularizer, start=0.05)
    if isinstance(regularizer, tb.NonNegativeL1):
        for p in model.parameters():
            p.data.abs_()
    train(model, optim, tb.TargetDensity(optim, 0.3, total_steps=STEPS), STEPS)
    largest = 1 if isinstance(regularizer, tb.NonNegativeL1) else 60
    assert abs(kept(model) - 0.3 * 4400) <= largest


def test_kernels_of_a_convnet():
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 8, 5)
    )
    regularizer = {nn.Conv2d: tb.GroupL1("kernels"), nn.Linear: tb.L1()}
    model, optim = make("adabreg", regularizer, model=model, start=0.05)
    train(model, optim, tb.TargetDensity(optim, 0.2, total_steps=STEPS), STEPS, shape=(1, 6, 8))
    size = sum(m.weight.numel() for m in model.modules() if hasattr(m, "weight"))
    assert abs(kept(model) - 0.2 * size) <= 9
    conv = model[2].weight.flatten(2).count_nonzero(2)
    assert set(conv.flatten().tolist()) <= {0, 9}


def test_a_target_per_group():
    model, _ = make()
    first, second = model[0].weight, model[2].weight
    rest = [p for p in model.parameters() if p is not first and p is not second]
    optim = tb.AdaBreg(
        [{"params": [first], "regularizer": tb.L1()}, {"params": [second], "regularizer": tb.L1()}, {"params": rest}],
        lr=1e-2,
    )
    control = tb.TargetDensity(optim, [0.1, 0.25, None], total_steps=STEPS)
    train(model, optim, control, STEPS)
    assert int(first.count_nonzero()) == 180
    assert int(second.count_nonzero()) == 600
    assert optim.param_groups[0]["lam"] != optim.param_groups[1]["lam"]


def test_groups_keep_the_ratio_of_their_lam():
    model, _ = make()
    lam = {"0": 0.02, "*": 0.01}
    optim = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam), lr=1e-2)
    train(model, optim, tb.TargetDensity(optim, 0.1, total_steps=STEPS), STEPS)
    assert optim.param_groups[0]["lam"] == pytest.approx(2 * optim.param_groups[1]["lam"])
    assert abs(kept(model) - 440) <= 1


def test_lam_per_entry():
    model, _ = make()
    lam = {"0": torch.linspace(0.01, 0.03, 30), "*": 0.01}
    optim = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam), lr=1e-2)
    train(model, optim, tb.TargetDensity(optim, 0.1, total_steps=STEPS), STEPS)
    assert abs(kept(model) - 440) <= 1


def test_an_unregularised_layer_counts_but_is_not_touched():
    model, _ = make()
    optim = tb.AdaBreg(tb.param_groups(model, {"4": None, "*": tb.L1()}), lr=1e-2)
    train(model, optim, tb.TargetDensity(optim, 0.1, total_steps=STEPS), STEPS)
    assert kept(model) == 440
    assert int(model[4].weight.count_nonzero()) > 150  # far above 10 %: no λ holds it back


def test_biases_under_the_penalty_do_not_count():
    model, _ = make()
    optim = tb.AdaBreg(model.parameters(), lr=1e-2, regularizer=tb.L1())
    with pytest.warns(UserWarning, match="more than half dense"):  # the biases
        train(model, optim, tb.TargetDensity(optim, 0.1, total_steps=STEPS), STEPS)
    assert kept(model) == 440


def test_the_ramp_starts_where_the_model_does():
    model, optim = make(start=0.4)
    control = tb.TargetDensity(optim, 0.05, "exact", ramp=50)
    seen = []
    train(model, optim, control, 60, after=lambda k: seen.append(tb.density(model)))
    assert seen[0] > 0.3
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(seen))
    assert seen[-1] == 0.05


@pytest.mark.parametrize("mode", ["feedback", "exact"])
def test_resuming_is_bit_exact(mode):
    def build():
        model, optim = make("adabreg")
        return model, optim, tb.TargetDensity(optim, 0.06, mode, total_steps=80, ramp=20)

    model, optim, control = build()
    train(model, optim, control, 33)
    saved = copy.deepcopy([model.state_dict(), optim.state_dict(), control.state_dict()])
    train(model, optim, control, 47, seed=2)
    other, optim2, control2 = build()
    for thing, state in zip((other, optim2, control2), saved, strict=True):
        thing.load_state_dict(state)
    train(other, optim2, control2, 47, seed=2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    assert optim.param_groups[0]["lam"] == optim2.param_groups[0]["lam"]
    assert kept(model) == round(0.06 * 4400)


def test_proxsgd_follows_and_prunes_at_the_end():
    model, _ = make()
    torch.manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.reset_parameters()
    optim = tb.ProxSGD(tb.param_groups(model, tb.L1(), lam=1e-4), lr=0.1)
    control = tb.TargetDensity(optim, 0.1, total_steps=1500, every=50, gain=0.5)
    seen = []
    train(model, optim, control, 1500, after=lambda k: seen.append(kept(model)))
    assert seen[0] > 4000
    assert 300 < seen[-1] <= 440  # pruning takes away and adds nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, r"`density`: 0.0"),
        ({"density": 1.0}, r"`density`: 1.0"),
        ({"density": 5}, r"`density`: 5.*0.05"),
        ({"density": float("nan")}, r"`density`: nan"),
        ({"density": "5%"}, r"`density`: '5%'"),
        ({"density": [0.1]}, r"1 entries; expected one per parameter group, 2"),
        ({"density": [0.1, 0.2]}, r"`density\[1\]`: 0.2; that group has no regularised"),
        ({"mode": "exakt"}, r"'exakt'.*did you mean 'exact'"),
        ({"total_steps": 0}, r"`total_steps`: 0"),
        ({"every": -1}, r"`every`: -1"),
        ({"gain": 0}, r"`gain`: 0"),
        ({"settle": 1.5}, r"`settle`: 1.5"),
    ],
)
def test_bad_options_are_named(change, message):
    _, optim = make()
    with pytest.raises(ValueError, match=message):
        tb.TargetDensity(optim, **change)


def test_what_cannot_be_reached_is_refused_with_the_reason():
    model, _ = make()
    optim = tb.AdaBreg(tb.param_groups(model, {"0": tb.L1()}))
    model[2].weight.data.fill_(1.0)
    with pytest.raises(ValueError, match=r"`density`: 0.05 cannot be reached; 5\d\.\d+% of the weights"):
        tb.TargetDensity(optim, 0.05)
    with pytest.raises(ValueError, match="regularises no weights"):
        tb.TargetDensity(tb.AdaBreg(model.parameters()), 0.05)
    with pytest.raises(ValueError, match="low rank"):
        tb.TargetDensity(tb.AdaBreg(tb.param_groups(model, tb.NuclearNorm())), 0.05)
    with pytest.raises(ValueError, match="expected LinBreg"):
        tb.TargetDensity(torch.optim.Adam(model.parameters()), 0.05)
    with pytest.raises(ValueError, match=r"no dual.*`lam` to start from"):
        tb.TargetDensity(tb.ProxSGD(tb.param_groups(model)), 0.05)


@pytest.mark.parametrize("seed", range(20))
def test_threshold_leaves_the_number_asked_for(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(1000, generator=generator) * (10 ** (seed % 5 - 2))
    for count in (0, 1, 17, 500, 999):
        assert int((values > threshold_for(values, count)).sum()) == count


def test_threshold_takes_whole_groups():
    values = torch.tensor([5.0] * 4 + [3.0] * 4 + [1.0] * 4)
    for asked, got in [(1, 4), (4, 4), (5, 4), (7, 8), (8, 8), (11, 12), (12, 8)]:
        lam = threshold_for(values, asked)
        # the very last entry cannot be asked for with every other one: λ > 0 needs something below it
        assert int((values > lam).sum()) == got or asked == 12


# ---------------------------------------------------------------------- λ found by counting, where it is nearly right


@pairwise({"kind": [tb.LinBreg, tb.AdaBreg], "dtype": FLOATS, "mode": ["exact", "feedback"]})
def test_counting_near_lam_finds_what_sorting_finds(
    kind: type, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    answers: list[bool] = []

    def run(counting: bool) -> tuple[list[torch.Tensor], list[float]]:
        from torch_bregman import control as module
        from torch_bregman.optim.select import near_kth

        def asked(*args: object) -> object:
            found = near_kth(*args) if counting else None  # type: ignore[arg-type]
            answers.append(found is not None)
            return found

        monkeypatch.setattr(module, "near_kth", asked)
        generator = torch.Generator().manual_seed(0)
        shapes = ((211, 130), (64, 33), (300, 7))
        params = [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
        for p in params:
            p.data *= torch.rand(p.shape, generator=generator) < 0.05
        groups = [{"params": params[:2], "lam": 0.2}, {"params": params[2:], "lam": 0.05}]
        optimizer = kind(groups, lr=0.05, regularizer=tb.L1(), fused=True)
        control = tb.TargetDensity(optimizer, 0.05, mode=mode, every=2 if mode == "feedback" else 1)
        densities = []
        for _ in range(60):
            for p in params:
                p.grad = 0.1 * torch.randn(p.shape, generator=generator, dtype=dtype)
            optimizer.step()
            control.step()
            densities.append(control.density)
        return params, densities

    counted, got = run(True)
    assert sum(answers) > len(answers) / 2  # it was used, and not only in the first steps
    if mode == "exact":
        size = sum(p.numel() for p in counted)
        assert {round(d * size) for d in got[10:]} == {round(0.05 * size)}  # Adam's first steps are all alike: ties
    sorted_, other = run(False)
    # λ lies somewhere between two neighbours, in float64 here and in the dtype of v there; in Adam's first step, where
    # all are alike, rounding says whether ties across the two groups are equal.
    assert max(abs(a - b) for a, b in zip(got[1:], other[1:], strict=True)) < (1e-4 if mode == "exact" else 5e-3)
    for a, b in zip(counted, sorted_, strict=True):
        assert float(((a != 0) != (b != 0)).double().mean()) < 0.01
