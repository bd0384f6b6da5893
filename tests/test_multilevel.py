"""Fine and coarse steps: against a reference that masks what the dense optimizer does, and against a user's habits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import pairwise
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman import kernels
from torch_bregman.multilevel import choice, off_support
from torch_bregman.part import Part

FORMS = ["masked", "sparse"]

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "linbreg": lambda groups: tb.LinBreg(groups, lr=0.2),
    "paper momentum": lambda groups: tb.LinBreg(groups, lr=0.2, momentum=0.9),
    "sgd momentum": lambda groups: tb.LinBreg(groups, lr=0.05, momentum=0.9, momentum_rule="sgd"),
    "nesterov": lambda groups: tb.LinBreg(groups, lr=0.05, momentum=0.9, momentum_rule="sgd", nesterov=True),
    "adabreg": lambda groups: tb.AdaBreg(groups, lr=0.01),
    "decay": lambda groups: tb.LinBreg(groups, lr=0.2, weight_decay=0.01),
    "delta": lambda groups: tb.LinBreg(groups, lr=0.2, delta=2.0),
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every layer computes in this form, whatever is faster."""
    if request.param == "sparse" and not kernels.available():
        pytest.skip("needs numba")
    for name in ("FASTER", "ABLE"):
        monkeypatch.setattr(choice, name, float("inf") if request.param == "sparse" else 0.0)
    return str(request.param)


def mlp(seed: int = 0, density: float = 0.3) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 3))
    return tb.sparse_init_(model, density)


def convnet(seed: int = 0, density: float = 0.3) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return tb.sparse_init_(model, density)


def batch(i: int, shape: tuple[int, ...] = (12,)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + i)
    return torch.randn(9, *shape, generator=generator), torch.randint(0, 3, (9,), generator=generator)


def train(
    model: nn.Module, optimizer: Any, steps: range, *after: Callable[[], Any], shape: tuple[int, ...] = (12,)
) -> None:
    for i in steps:
        x, y = batch(i, shape)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        for call in after:
            call()


def reference(
    model: nn.Module,
    optimizer: Any,
    steps: range,
    coarse: int,
    shape: tuple[int, ...] = (12,),
    owners: dict[Tensor, Tensor] | None = None,
) -> None:
    """The published algorithm by brute force: dense steps, of which everything off the support is taken back.

    `owners`: parameters that rest as long as the row of another one is dead.
    """
    support: dict[Tensor, Tensor] = {}
    for i in steps:
        before, held = {}, {}
        if i % (coarse + 1):
            for p, mask in support.items():
                state = {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v) and v.dim()}
                before[p], held[p] = (mask, state), p.detach().clone()
        train(model, optimizer, range(i, i + 1), shape=shape)
        for p, (mask, state) in before.items():
            for name, value in state.items():
                now = optimizer.state[p][name]
                now.copy_(torch.where(mask, now, value))
            with torch.no_grad():
                p.copy_(torch.where(mask, p, held[p]))
        if i % (coarse + 1) == 0:
            for group, reg in zip(optimizer.param_groups, optimizer.regularizers, strict=True):
                if reg is not None:
                    for p in group["params"]:
                        support[p] = reg.coupled(p.detach() != 0)
            for p, weight in (owners or {}).items():
                support[p] = (weight.detach() != 0).flatten(1).any(1)


def states(optimizer: Any) -> list[dict[str, Any]]:
    return [state for _, state in sorted(optimizer.state_dict()["state"].items())]


def same(a: Any, b: Any, **tolerance: float) -> None:
    assert len(states(a)) == len(states(b))
    for one, two in zip(states(a), states(b), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            kind = {**(tolerance or {"rtol": 1e-9, "atol": 1e-11})}
            torch.testing.assert_close(value, two[name], msg=lambda text, name=name: f"{name}: {text}", **kind)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("coarse", [1, 4])
def test_it_is_the_published_algorithm(name: str, coarse: int, form: str) -> None:
    ours, theirs = mlp(), mlp()
    a = OPTIMIZERS[name](tb.param_groups(ours, tb.L1(), lam=0.05))
    b = OPTIMIZERS[name](tb.param_groups(theirs, tb.L1(), lam=0.05))
    levels = tb.Multilevel(ours, a, coarse_steps=coarse, fine_steps=1, boost=1.0)
    # A first step in the full space, a coarse phase, and so on; the last one is in the middle of a phase.
    n = 5 * (coarse + 1) + 1 + coarse // 2
    train(ours, a, range(n), levels.step)
    reference(theirs, b, range(n), coarse)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    same(a, b)
    assert levels.counts["fine"] == 6
    assert tb.density(ours) < 0.9


@pytest.mark.parametrize(
    "regularizer",
    [
        {nn.Linear: tb.GroupL1("rows"), nn.Conv2d: tb.GroupL1("filters")},
        {nn.Linear: tb.GroupL1("columns"), nn.Conv2d: tb.GroupL1("channels")},
        {nn.Linear: tb.SparseGroupL1("rows"), nn.Conv2d: tb.GroupL1("kernels", weighted=False)},
        {nn.Linear: tb.NonNegativeL1(), nn.Conv2d: tb.GroupL1("kernels")},
    ],
)
@pytest.mark.parametrize("name", ["linbreg", "adabreg"])
def test_groups_are_restricted_whole(name: str, regularizer: Any, form: str) -> None:
    ours, theirs = convnet(), convnet()
    for model in (ours, theirs):
        if isinstance(regularizer[nn.Linear], tb.NonNegativeL1):
            model[6].weight.data.abs_()
        for module in (model[0], model[3], model[6]):  # some groups of each kind are dead
            module.weight.data[:1] = 0
            module.weight.data[:, -1:] = 0
    a = OPTIMIZERS[name](tb.param_groups(ours, regularizer, lam=0.02))
    b = OPTIMIZERS[name](tb.param_groups(theirs, regularizer, lam=0.02))
    levels = tb.Multilevel(ours, a, coarse_steps=3, fine_steps=1, boost=1.0)
    train(ours, a, range(15), levels.step, shape=(1, 5, 5))
    owners = {}
    if form == "sparse" and regularizer[nn.Conv2d].groups == "filters":  # then dead units are left out altogether
        owners = {theirs[0].bias: theirs[0].weight, theirs[1].weight: theirs[0].weight,
                  theirs[1].bias: theirs[0].weight, theirs[3].bias: theirs[3].weight}  # fmt: skip
    reference(theirs, b, range(15), 3, shape=(1, 5, 5), owners=owners)
    assert not owners or any(made.kind == "compact" for made in levels.choices.values())
    if form == "sparse" and regularizer[nn.Conv2d].groups == "kernels":
        assert {levels.choices[name].kind for name in ("0", "3")} == {"sparse"}
    for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    same(a, b, rtol=1e-8, atol=1e-10)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


class Residual(nn.Module):
    """Filters that write to one stream, constants that meet a border, a layer that nothing regularises in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.hidden, self.head = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.elu(self.a(x)))
        x = F.max_pool2d(F.relu(self.deep(x)), 2).mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


@pytest.mark.parametrize("seed", range(3))
def test_compact_networks_have_the_gradients_of_the_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTER", float("inf"))
    torch.manual_seed(seed)
    model = Residual()
    for layer in (model.stem, model.a, model.b, model.hidden):
        layer.weight.data[torch.rand(len(layer.weight)) < 0.6] = 0
    groups = {"deep.*": None, "head.*": None, nn.Conv2d: tb.GroupL1("filters"), nn.Linear: tb.GroupL1("rows")}
    optimizer = tb.LinBreg(tb.param_groups(model, groups, lam=0.01), lr=1e-3)
    levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
    train(model, optimizer, range(2), levels.step, shape=(2, 8, 8))
    assert levels.choices["(network)"].kind == "compact"
    x, y = batch(7, (2, 8, 8))
    twin = copy.deepcopy(model)
    optimizer.zero_grad()
    losses = []
    for net in (model, twin):
        losses.append(F.cross_entropy(net(x), y))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    full = dict(zip(model.parameters(), twin.parameters(), strict=True))
    for part in levels._exchange.parts:
        wanted = full[part.live.full].grad
        assert wanted is not None
        torch.testing.assert_close(part.live.values.grad, part.live.where.restrict(wanted))
    restricted = {part.live.full for part in levels._exchange.parts}
    for p, q in full.items():
        if p not in restricted:
            torch.testing.assert_close(p.grad, q.grad)
    # In eval mode the whole network answers, with up-to-date running statistics.
    for one, two in zip(model.eval().buffers(), twin.eval().buffers(), strict=True):
        torch.testing.assert_close(one, two)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))


def test_filters_of_a_depthwise_layer_rest_with_their_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are alive and restricted, but the filters that fed some of them are dead."""
    monkeypatch.setattr(choice, "FASTER", float("inf"))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(),
        nn.Linear(96, 3),
    )  # fmt: skip
    model[0].weight.data[[1, 2, 4]] = 0
    model[3].weight.data[[0, 2, 4]] = 0
    optimizer = tb.LinBreg(tb.param_groups(model, {"6.*": None, nn.Conv2d: tb.GroupL1("filters")}, lam=0.01), lr=0.02)
    levels = tb.Multilevel(model, optimizer, coarse_steps=4)
    train(model, optimizer, range(1), levels.step, shape=(2, 8, 8))
    assert levels.choices["(network)"].kind == "compact"
    x, y = batch(7, (2, 8, 8))
    twin, before = copy.deepcopy(model), model[3].weight.detach().clone()
    torch.testing.assert_close(F.cross_entropy(model(x), y), F.cross_entropy(twin(x), y))
    train(model, optimizer, range(1, 5), levels.step, shape=(2, 8, 8))
    moved = (model[3].weight != before).flatten(1).any(1)
    assert moved.tolist() == [False, False, False, True, False, True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_compact_network_on_a_gpu_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTER", float("inf"))
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Residual()
        for layer in (model.stem, model.a, model.b, model.hidden):
            layer.weight.data[::2] = 0
        # Of a dead filter a constant is left, the bias of the norm. At 0 rounding would decide about the ReLU's slope.
        nn.init.uniform_(model.norm.bias, 0.1, 0.5)
        model.to(device)
        groups = {"deep.*": None, "head.*": None, nn.Conv2d: tb.GroupL1("filters"), nn.Linear: tb.GroupL1("rows")}
        optimizer = tb.AdaBreg(tb.param_groups(model, groups, lam=0.01), lr=1e-3)
        levels = tb.Multilevel(model, optimizer, coarse_steps=4, fine_steps=1)
        for i in range(14):
            x, y = (t.to(device) for t in batch(i, (2, 8, 8)))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            levels.step()
        assert levels.choices["(network)"].kind == "compact"
        results.append([t.detach().cpu() for t in model.state_dict().values()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_a_compact_run_resumes_bit_for_bit(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FASTER", float("inf"))

    def make() -> tuple[Any, ...]:
        torch.manual_seed(0)
        model = Residual()
        for layer in (model.stem, model.a, model.b, model.hidden):
            layer.weight.data[::2] = 0
        groups = {"deep.*": None, "head.*": None, nn.Conv2d: tb.GroupL1("filters"), nn.Linear: tb.GroupL1("rows")}
        optimizer = tb.AdaBreg(tb.param_groups(model, groups, lam=0.01), lr=1e-3)
        return model, optimizer, tb.Multilevel(model, optimizer, coarse_steps=4, fine_steps=1)

    one, two = make(), make()
    train(one[0], one[1], range(14), one[2].step, shape=(2, 8, 8))
    train(two[0], two[1], range(stop), two[2].step, shape=(2, 8, 8))
    saved, three = copy.deepcopy([part.state_dict() for part in two]), make()
    for part, state in zip(three, saved, strict=True):
        part.load_state_dict(state)
    train(three[0], three[1], range(stop, 14), three[2].step, shape=(2, 8, 8))
    for p, q in zip(one[0].state_dict().values(), three[0].state_dict().values(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("factor", [0.2, 1.0, 1.5, 20.0])
@pytest.mark.parametrize("name", ["linbreg", "adabreg"])
def test_a_lambda_that_moved_before_a_coarse_phase_leaves_no_weight_behind(name: str, factor: float, form: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=3, fine_steps=1, margin=1.0)
    train(model, optimizer, range(1))
    for group in optimizer.param_groups:
        group["lam"] *= factor
    levels.step()
    assert levels.restricted
    for part in levels._exchange.parts:
        outside = part.live.full.detach().clone()
        part.live.pattern.prolong(torch.zeros(len(part.live.pattern)), outside)
        assert not outside.any()
    train(model, optimizer, range(1, 4), levels.step)
    levels.leave()
    for layer in (model[0], model[2], model[4]):
        state = optimizer.state[layer.weight]
        torch.testing.assert_close(layer.weight.detach(), tb.L1().prox(state["dual"], state["lam"]))


@pytest.mark.parametrize("name", ["linbreg", "adabreg"])
def test_boost_scales_the_fine_step_off_the_support(name: str, form: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=2, fine_steps=1, boost=3.0)
    train(model, optimizer, range(3), levels.step)
    twin = mlp()
    plain = OPTIMIZERS[name](tb.param_groups(twin, tb.L1(), lam=0.05))
    twin.load_state_dict(model.state_dict())
    plain.load_state_dict(optimizer.state_dict())
    train(twin, plain, range(3, 4))
    before, masks = states(optimizer), [p != 0 for i in range(2) for p in _full(model, optimizer, i)]
    before = [{**state, "dual": state["dual"].clone()} for state in before]
    train(model, optimizer, range(3, 4), levels.step)
    for old, one, two, mask in zip(before, states(optimizer), states(plain), masks, strict=True):
        if one["dual"].dim() > 1:
            wanted = torch.where(mask, two["dual"], old["dual"] + 3 * (two["dual"] - old["dual"]))
            torch.testing.assert_close(one["dual"], wanted)
            assert (one["dual"] != two["dual"]).any()
    torch.testing.assert_close(model[0].weight, tb.L1().prox(states(optimizer)[0]["dual"], 0.05))


def stepped(shape: tuple[int, ...], reg: Any, gradients: list[Tensor]) -> tuple[nn.Parameter, Any]:
    """A weight that is zero, after steps of AdaBreg that leave it so."""
    p = nn.Parameter(torch.zeros(shape))
    optimizer = tb.AdaBreg([{"params": [p], "regularizer": reg, "lam": 100.0}], lr=0.01)
    for g in gradients:
        p.grad = g
        optimizer.step()
    return p, optimizer


@pairwise(
    {
        "regularizer": {repr(reg): reg for reg in (tb.L1(), tb.NonNegativeL1(), tb.GroupL1("kernels"))},
        "maximize": [False, True],
        "layout": {"rows": torch.contiguous_format, "channels last": torch.channels_last},
        "few": {"kernel": 0, "torch": 1000},
    },
    strength=3,
)
def test_what_a_fine_step_makes_up_for(
    regularizer: Any, maximize: bool, layout: torch.memory_format, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the equations, entry by entry; with few=0 by the kernel."""
    if not few and not kernels.available():
        pytest.skip("needs numba")
    monkeypatch.setattr(off_support, "FEW", few)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 4, 3, 3, generator=generator) + 1 for _ in range(30)]
    p, optimizer = stepped((5, 4, 3, 3), regularizer, gradients[:-1])
    state, group = optimizer.state[p], optimizer.param_groups[0]
    group["maximize"] = maximize
    if isinstance(regularizer, tb.GroupL1):
        spans, index = (2, 3), torch.tensor([3, 7])
    else:
        spans, index = (), torch.tensor([0, 50, 51])
    seen = Part(p, spans, index)
    state["lam"] = 0.35
    with torch.no_grad():
        for t in (p.data, *(state[name] for name in ("dual", "exp_avg", "exp_avg_sq"))):
            t.set_(t.contiguous(memory_format=layout))
    before = {name: state[name].clone() for name in ("dual", "exp_avg", "exp_avg_sq")}
    p.grad = g = gradients[-1].contiguous(memory_format=layout)
    off_support.take_missed_steps(p, state, group, regularizer, seen, 7)

    m2 = 0.999**7 * before["exp_avg_sq"] + (1 - 0.999**7) * g**2
    first = (0.9 * before["exp_avg"] + 0.1 * (-g if maximize else g)) / (1 - 0.9**30)
    second = (0.999 * m2 + 0.001 * g**2) / (1 - 0.999**30)
    share = ((first**2 / second - 0.1 / 1.9) / (1 - 0.1 / 1.9)).clamp(0, 1)
    v = before["dual"] - 7 * 0.01 * share * first / (second.sqrt() + 1e-8)
    v = v - regularizer.prox(v, 0.35)  # on the ball of λ
    mask = torch.zeros(p.shape, dtype=torch.bool)
    seen.prolong(seen.restrict(torch.ones_like(mask)), mask)
    torch.testing.assert_close(state["exp_avg_sq"], torch.where(mask, before["exp_avg_sq"], m2))
    torch.testing.assert_close(state["dual"], torch.where(mask, before["dual"], v), rtol=1e-3, atol=1e-9)
    assert torch.equal(state["exp_avg"], before["exp_avg"])
    assert not regularizer.prox(torch.where(mask, 0, state["dual"]), 0.35).any()
    assert (state["dual"] - before["dual"]).abs().max() > 0.01


def test_gradients_that_agree_are_made_up_for_and_noise_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(4000, generator=generator) for _ in range(1000)]
    seen = Part(torch.zeros(4000), (), torch.zeros(0, dtype=torch.int64))
    moved = []
    for gradients in ([torch.ones(4000)] * 1000, noise):
        p, optimizer = stepped((4000,), tb.L1(), gradients)
        before = optimizer.state[p]["dual"].clone()
        optimizer.state[p]["step"] += 9  # as the coarse steps have counted
        off_support.take_missed_steps(p, optimizer.state[p], optimizer.param_groups[0], tb.L1(), seen, 9)
        moved.append(((optimizer.state[p]["dual"] - before) / 0.09).abs())
    torch.testing.assert_close(moved[0], torch.ones(4000))  # nine steps of lr
    assert moved[1].mean() < 0.03


@pytest.mark.parametrize("regularizer", [tb.L1(), tb.GroupL1("rows")], ids=repr)
def test_weights_of_half_precision_are_made_up_for_in_full(regularizer: Any) -> None:
    p = nn.Parameter(torch.zeros(6, 8, dtype=torch.bfloat16))
    optimizer = tb.AdaBreg([{"params": [p], "regularizer": regularizer, "lam": 50.0}], lr=0.01)
    for _ in range(200):
        p.grad = torch.ones_like(p)
        optimizer.step()
    before = optimizer.state[p]["dual"].clone()
    seen = (
        Part(p, (1,), torch.tensor([2])) if isinstance(regularizer, tb.GroupL1) else Part(p, (), torch.arange(16, 24))
    )
    off_support.take_missed_steps(p, optimizer.state[p], optimizer.param_groups[0], regularizer, seen, 9)
    moved = optimizer.state[p]["dual"] - before
    assert optimizer.state[p]["dual"].dtype == torch.float32
    assert not moved[2].any()
    assert (moved[:2] < -0.05).all()


def test_a_weight_without_gradients_has_nothing_to_make_up_for() -> None:
    p, optimizer = stepped((6,), tb.L1(), [torch.zeros(6)] * 3)
    off_support.take_missed_steps(
        p, optimizer.state[p], optimizer.param_groups[0], tb.L1(), Part(p, (), torch.tensor([1])), 5
    )
    assert not optimizer.state[p]["dual"].any()


@pytest.mark.skipif(not kernels.available(), reason="needs numba")
@pytest.mark.parametrize("stop", [9, 10, 11, 15, 20])
def test_what_is_chosen_well_resumes_bit_for_bit(stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTER", "ABLE"):
        monkeypatch.setattr(choice, name, float("inf"))
    calls, take_missed_steps = [], off_support.take_missed_steps

    def spy(*args: Any) -> None:
        calls.append(args[-1])
        take_missed_steps(*args)

    monkeypatch.setattr(off_support, "take_missed_steps", spy)

    def new() -> tuple[nn.Module, Any, tb.Multilevel]:
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        return model, optimizer, tb.Multilevel(model, optimizer)

    one, three = new(), new()
    train(one[0], one[1], range(35), one[2].step)
    assert calls == [9] * 9  # three weights, in the fine steps after the three phases
    two = new()
    train(two[0], two[1], range(stop), two[2].step)
    for part, saved in zip(three, [copy.deepcopy(part.state_dict()) for part in two], strict=True):
        part.load_state_dict(saved)
    train(three[0], three[1], range(stop, 35), three[2].step)
    assert one[2].counts == three[2].counts == {"fine": 4, "coarse": 31}
    for p, q in zip(one[0].state_dict().values(), three[0].state_dict().values(), strict=True):
        assert torch.equal(p, q)
    for a, b in zip(states(one[1]), states(three[1]), strict=True):
        assert torch.equal(a["dual"], b["dual"])


@pytest.mark.parametrize("order", ["control first", "levels first"])
def test_the_density_is_reached_in_either_order_of_calls(order: str, form: str) -> None:
    model = mlp()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=0.01)
    control = tb.TargetDensity(optimizer, 0.2, total_steps=100)
    levels = tb.Multilevel(model, optimizer, coarse_steps=5)
    calls = (control.step, levels.step) if order == "control first" else (levels.step, control.step)
    for i in range(100):
        train(model, optimizer, range(i, i + 1), *calls)
        if i > 20:
            assert 0.1 < tb.density(model) < 0.21  # within a phase weights only disappear
    assert tb.density(model) == pytest.approx(0.2, abs=2e-3)


@pairwise(
    {
        "order": [(0, 1, 2), (2, 0, 1), (0, 2, 1)],
        "coarse": [None, 3, 4],
        "margin": [0.0, 1.0],
        "mode": ["feedback", "exact"],
        "stop": [1, 2, 5, 8, 13, 19],
    }
)
def test_the_order_of_the_calls_does_not_matter_bit_for_bit(
    order: tuple[int, ...], coarse: int | None, margin: float, mode: str, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two controls and Multilevel called in this order, stopped and gone on with, against controls first throughout."""
    for name in ("FASTER", "ABLE"):
        monkeypatch.setattr(choice, name, float("inf"))

    def make() -> tuple[list[Any], list[Callable[[], Any]]]:
        model = mlp()
        weights, biases = tb.param_groups(model, tb.L1())
        kept = {**weights, "params": weights["params"][2:], "lam": 0.05}
        optimizer = tb.AdaBreg([{**weights, "params": weights["params"][:2]}, kept, biases], lr=0.01)
        options: Any = {"mode": mode, "total_steps": 24, "every": 2}
        one = tb.TargetDensity(optimizer, [0.25, None, None], **options)
        two = tb.TargetDensity(optimizer, [None, 0.4, None], **options)
        levels = tb.Multilevel(model, optimizer, coarse, margin=margin)
        return [model, optimizer, one, two, levels], [one.step, two.step, levels.step]

    if coarse is None and not kernels.available():
        pytest.skip("needs numba")
    (first, calls), (second, others) = make(), make()
    train(first[0], first[1], range(24), *calls)
    train(second[0], second[1], range(stop), *(others[i] for i in order))
    saved, (third, again) = copy.deepcopy([part.state_dict() for part in second]), make()
    for part, state in zip(third, saved, strict=True):
        part.load_state_dict(state)
    train(third[0], third[1], range(stop, 24), *(again[i] for i in order))
    for p, q in zip(first[0].parameters(), third[0].parameters(), strict=True):
        assert torch.equal(p, q)
    same(first[1], third[1], rtol=0, atol=0)
    assert first[4].counts == third[4].counts
    assert first[4].counts["coarse"] > 0
    assert (first[4].flops, first[4].left) == (third[4].flops, third[4].left)


@pytest.mark.parametrize("looks", ["at nothing", "between the calls"])
def test_a_step_that_waits_for_a_control_is_saved_and_never_lost(looks: str) -> None:
    """Stopped between the calls of both; and a control that is not called any more holds nothing up."""

    def make() -> list[Any]:
        model = mlp()
        optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.05), lr=0.01)
        control = tb.TargetDensity(optimizer, 0.25, every=2)
        return [model, optimizer, control, tb.Multilevel(model, optimizer, coarse_steps=2)]

    one, two = make(), make()
    train(one[0], one[1], range(12), one[2].step, one[3].step)
    for i in range(12):
        train(two[0], two[1], range(i, i + 1), two[3].step)
        if looks == "between the calls":
            saved, two = copy.deepcopy([part.state_dict() for part in two]), make()
            for part, state in zip(two, saved, strict=True):
                part.load_state_dict(state)
        two[2].step()
    for p, q in zip(one[0].parameters(), two[0].parameters(), strict=True):
        assert torch.equal(p, q)
    same(one[1], two[1], rtol=0, atol=0)
    assert one[3].counts == two[3].counts == {"fine": 4, "coarse": 8}
    train(two[0], two[1], range(12, 18), two[3].step)
    assert two[3].counts.total() == 17  # the last one waits
    two[0](batch(0)[0])
    assert two[3].counts == {"fine": 6, "coarse": 12}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_coarse_steps_are_the_optimizer_bit_for_bit(name: str) -> None:
    ours, theirs = mlp(), mlp()
    a = OPTIMIZERS[name](tb.param_groups(ours, tb.L1(), lam=0.05))
    b = OPTIMIZERS[name](tb.param_groups(theirs, tb.L1(), lam=0.05))
    levels = tb.Multilevel(ours, a, coarse_steps=0)
    train(ours, a, range(20), levels.step)
    train(theirs, b, range(20))
    same(a, b, rtol=0, atol=0)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert levels.counts == {"fine": 20, "coarse": 0}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_off_the_support_nothing_moves_in_a_coarse_phase(name: str, form: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=6, fine_steps=2)
    train(model, optimizer, range(2), levels.step)
    masks = [p != 0 for p in model.parameters()]
    before = copy.deepcopy(states(optimizer))
    by_group = [p for group in optimizer.param_groups for p in group["params"]]
    assert levels.restricted
    train(model, optimizer, range(2, 7), levels.step)
    assert levels.restricted
    train(model, optimizer, range(7, 8), levels.step)
    assert not levels.restricted
    after = states(optimizer)
    full = [p for i in range(2) for p in _full(model, optimizer, i)]
    assert len(by_group) == len(full)
    for p, old, new in zip(full, before, after, strict=True):
        mask = next((m for m, q in zip(masks, model.parameters(), strict=True) if q is p))
        if p.dim() < 2:
            continue
        for key, value in old.items():
            if torch.is_tensor(value) and value.shape == p.shape:
                assert torch.equal(value[~mask], new[key][~mask]), key
        assert not torch.equal(old["dual"][mask], new["dual"][mask])
        assert not p[~mask].any()


def _full(model: nn.Module, optimizer: Any, group: int) -> list[Tensor]:
    """The parameters of the full space in the order of the optimizer: weights first, then biases."""
    return [p for p in model.parameters() if (p.dim() > 1) == (group == 0)]


@pytest.mark.parametrize("name", ["linbreg", "nesterov", "adabreg"])
def test_a_margin_moves_v_near_the_threshold_and_no_weight(name: str, form: str) -> None:
    """By brute force: a copy takes dense steps, of which everything off the support and the margin is taken back."""
    model, twin = mlp(), mlp()
    ours = OPTIMIZERS[name](tb.param_groups(model, tb.L1(), lam=0.05))
    theirs = OPTIMIZERS[name](tb.param_groups(twin, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, ours, coarse_steps=5, fine_steps=1, margin=0.5)
    train(model, ours, range(7), levels.step)  # a fine step, five coarse ones, a fine step: v is no longer at its start
    twin.load_state_dict(model.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert levels.restricted
    full = [p for i in range(2) for p in _full(twin, theirs, i)]
    parts = {(part.group, part.place): part.live for part in levels._exchange.parts}
    assert any(live.near is not None and len(live.near) for live in parts.values())
    for i in range(7, 12):
        before = copy.deepcopy(states(theirs))
        weights = [p.detach().clone() for p in full]
        train(twin, theirs, range(i, i + 1))
        for place, (p, old, weight) in enumerate(zip(full, before, weights, strict=True)):
            if p.dim() < 2:
                continue
            live, state = parts[0, place], theirs.state[p]
            kept, alive = torch.zeros_like(p, dtype=torch.bool), torch.zeros_like(p, dtype=torch.bool)
            kept.view(-1)[live.where.index] = True
            alive.view(-1)[live.pattern.index] = True
            for key, value in old.items():
                if torch.is_tensor(value) and value.shape == p.shape:
                    state[key].copy_(torch.where(kept, state[key], value))
            with torch.no_grad():
                p.copy_(torch.where(alive, p, weight))
            # What has passed the threshold waits: the readable step would take the zero there for an edit.
            limit = (1 - 1e-12) * 0.05
            waits = kept & ~alive & (state["dual"].abs() > limit)
            state["dual"].copy_(torch.where(waits, state["dual"].clamp(-limit, limit), state["dual"]))
        train(model, ours, range(i, i + 1), levels.step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert not levels.restricted


def test_what_the_optimizer_holds_is_as_large_as_what_lives(form: str) -> None:
    model = mlp(density=0.2)
    optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=5, fine_steps=1)
    train(model, optimizer, range(3), levels.step)
    assert levels.restricted
    live = sum(int((p != 0).sum()) for p in model.parameters() if p.dim() > 1)
    values = optimizer.param_groups[0]["params"]
    for tensors in (
        values,
        [p.grad for p in values],
        *[[optimizer.state[p][name] for p in values] for name in ("dual", "exp_avg", "exp_avg_sq")],
    ):
        assert live <= sum(t.numel() for t in tensors) <= live + 5  # a weight may have become zero within the phase
    shown: list[Any] = [p.grad for p in model.parameters() if p.dim() > 1]
    assert sum(grad.held.numel() for grad in shown) <= live + 5
    assert sum(grad.numel() for grad in shown) == sum(p.numel() for p in model.parameters() if p.dim() > 1)


@pairwise(
    {"name": ["sgd momentum", "adabreg"], "margin": [0.0, 1.0], "stop": range(1, 13), "form": FORMS}, indirect=["form"]
)
def test_it_resumes_bit_for_bit_at_any_step(name: str, margin: float, stop: int, form: str) -> None:
    def make() -> tuple[Any, ...]:
        model = mlp()
        optimizer = OPTIMIZERS[name](tb.param_groups(model, tb.L1(), lam=0.05))
        control = tb.TargetDensity(optimizer, 0.25, total_steps=24, every=2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24)
        levels = tb.Multilevel(model, optimizer, coarse_steps=4, fine_steps=2, margin=margin)
        return model, optimizer, control, schedule, levels

    one, two = make(), make()
    train(one[0], one[1], range(24), one[2].step, one[4].step, one[3].step)
    train(two[0], two[1], range(stop), two[2].step, two[4].step, two[3].step)
    saved = copy.deepcopy([part.state_dict() for part in two])
    three = make()
    for part, state in zip(three, saved, strict=True):
        part.load_state_dict(state)
    train(three[0], three[1], range(stop, 24), three[2].step, three[4].step, three[3].step)
    for p, q in zip(one[0].parameters(), three[0].parameters(), strict=True):
        assert torch.equal(p, q)
    same(one[1], three[1], rtol=0, atol=0)
    assert tb.density(one[0]) == pytest.approx(0.25, abs=2e-3)


def test_entries_that_passed_the_threshold_in_a_phase_are_no_edit_after_loading(form: str) -> None:
    def make() -> tuple[Any, ...]:
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.012))
        return model, optimizer, tb.Multilevel(model, optimizer, coarse_steps=8, margin=2.0)

    one, two, three = make(), make(), make()
    train(one[0], one[1], range(12), one[2].step)
    train(two[0], two[1], range(6), two[2].step)
    near = [part.live.values[len(part.live.pattern) :] for part in two[2]._exchange.parts]
    assert any(values.count_nonzero() for values in near)
    for mine, theirs in zip(three, two, strict=True):
        mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(three[0], three[1], range(6, 12), three[2].step)
    for p, q in zip(one[0].parameters(), three[0].parameters(), strict=True):
        assert torch.equal(p, q)
    same(one[1], three[1], rtol=0, atol=0)


@pytest.mark.parametrize("at", range(3, 9))
def test_looking_changes_nothing_and_shows_the_full_network(at: int, form: str) -> None:
    results = []
    for look in (False, True):
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=4, fine_steps=2)
        train(model, optimizer, range(at), levels.step)
        if look:
            x, _ = batch(0)
            full = mlp(seed=1)
            full.load_state_dict(model.state_dict())
            for grad in (torch.enable_grad, torch.no_grad):
                with grad():
                    torch.testing.assert_close(model(x), full(x), rtol=1e-12, atol=1e-12)
            twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
            for copied in (twin, other):
                assert all(type(m) in (nn.Sequential, nn.Linear, nn.ReLU, nn.Tanh) for m in copied.modules())
                torch.testing.assert_close(copied(x), full(x), rtol=1e-12, atol=1e-12)
            shapes = [s["dual"].shape for s in states(optimizer)]
            assert shapes == [p.shape for i in range(2) for p in _full(model, optimizer, i)]
            assert 0 < tb.density(model) < 1
            plain = OPTIMIZERS["adabreg"](tb.param_groups(full, tb.L1(), lam=0.05))
            plain.load_state_dict(optimizer.state_dict())
        train(model, optimizer, range(at, 20), levels.step)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_whoever_looks_at_a_weight_sees_its_live_values(form: str) -> None:
    """Also through a reference that was taken before, and without ending the phase."""
    model = mlp()
    weight = model[2].weight
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=50, fine_steps=1)
    looks: list[Callable[[], Tensor]] = [
        lambda: weight.clone(),
        lambda: weight.detach() + 0,
        lambda: weight.data.clone(),
        lambda: 1 * weight,
        lambda: torch.cat([weight]),
        lambda: weight[:],
        lambda: torch.from_numpy(weight.detach().numpy()),
        lambda: model.state_dict()["2.weight"],
        lambda: dict(model.named_parameters())["2.weight"].detach(),
        lambda: copy.deepcopy(model)[2].weight,
        lambda: copy.deepcopy(weight),
        lambda: torch._foreach_mul([weight], 1.0)[0],
    ]
    train(model, optimizer, range(2), levels.step)
    for i, look in enumerate(looks, 2):
        train(model, optimizer, range(i, i + 1), levels.step)
        live = next(part.live for part in levels._exchange.parts if part.live.full is weight)
        assert live.stale == (form == "sparse")
        assert weight.shape == (15, 20)
        assert weight.grad is not None
        assert weight.grad.shape == (15, 20)
        assert live.stale == (form == "sparse")  # that told nothing about the entries
        seen = look()
        assert not live.stale
        assert torch.equal(live.where.restrict(seen), live.values)
        assert int(seen.count_nonzero()) == int(live.values.count_nonzero())
        assert type(seen) in (Tensor, nn.Parameter)
    levels.leave()
    assert type(weight) is nn.Parameter
    assert model[2].weight is weight


def test_weights_that_are_changed_from_outside_are_honoured(form: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=10, fine_steps=1)
    train(model, optimizer, range(3), levels.step)
    weight = model[2].weight
    with torch.no_grad():
        weight.mul_(0.5)  # on the support
    halved = weight.detach().clone()
    x, _ = batch(0)
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, range(3, 5), levels.step)
    torch.testing.assert_close(weight, halved, rtol=1e-12, atol=1e-12)
    assert levels.restricted
    other = mlp(seed=3)
    model.load_state_dict(other.state_dict())  # another support
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)
    train(model, optimizer, range(5, 30), levels.step)
    torch.testing.assert_close(model[2].weight, other[2].weight, rtol=1e-12, atol=1e-12)
    assert levels.restricted


def test_evaluation_with_other_weights_that_are_put_back(form: str) -> None:
    """As an average of the weights is swapped in and out, also by way of `.data`."""
    results = []
    for swap in (False, True):
        model, average = mlp(), mlp(seed=5)
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=6, fine_steps=1)
        train(model, optimizer, range(4), levels.step)
        if swap:
            x, _ = batch(0)
            own = [p.data.clone() for p in model.parameters()]
            for p, q in zip(model.parameters(), average.parameters(), strict=True):
                p.data.copy_(q.data)
            with torch.no_grad():
                torch.testing.assert_close(model(x), average(x))
            for p, q in zip(model.parameters(), own, strict=True):
                p.data.copy_(q)
        train(model, optimizer, range(4, 15), levels.step)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_accumulated_gradients_and_closures(form: str) -> None:
    results = []
    for closure in (False, True):
        model = mlp()
        optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=3, fine_steps=2)
        for i in range(12):

            def loss(i: int = i, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros(())
                for j in (2 * i, 2 * i + 1):
                    x, y = batch(j)
                    part = F.cross_entropy(model(x), y) / 2
                    part.backward()
                    total += part.detach()
                return total

            if closure:
                assert torch.is_tensor(optimizer.step(loss))
            else:
                loss()
                optimizer.step()
            levels.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_scaled_losses_and_clipping_by_the_parameters_of_the_optimizer(form: str) -> None:
    results = []
    for scale in (1.0, 2.0**10):
        model = mlp()
        optimizer = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
        levels = tb.Multilevel(model, optimizer, coarse_steps=3, fine_steps=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for i in range(10):
            x, y = batch(i)
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            held = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(held, 0.5)
            assert float(torch.cat([p.grad.flatten() for p in held if p.grad is not None]).norm()) < 0.501
            scaler.step(optimizer)
            scaler.update()
            levels.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parts_of_a_sequential_answer_as_ever(form: str) -> None:
    """What is fused within a Sequential is not when its parts are called, or are looked at by hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Sequential(nn.Flatten(), nn.Linear(54, 20), nn.ReLU()),
        nn.Linear(20, 3),
    )  # fmt: skip
    tb.sparse_init_(model, 0.3)
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=50, fine_steps=1)
    train(model, optimizer, range(3), levels.step, shape=(2, 8, 8))
    x, _ = batch(0, (2, 8, 8))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(model(x), twin(x))
    for end in range(1, 5):
        torch.testing.assert_close(model[:end](x), twin[:end](x))
    step = x
    for mine, theirs in zip(model, twin, strict=True):
        torch.testing.assert_close(mine(step), theirs(step))
        step = mine(step)
    seen: list[Tensor] = []
    for place in (model[0], model[1], model[3][1]):
        place.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    model(x)
    torch.testing.assert_close(seen[0], twin[0](x))
    torch.testing.assert_close(seen[1], twin[:2](x))
    torch.testing.assert_close(seen[2], twin[3][:2](twin[:3](x)))


def test_a_penalty_on_the_weights_reaches_the_live_ones(form: str) -> None:
    """The gradient of a weight may come from elsewhere than the layer."""
    model = mlp()
    optimizer = OPTIMIZERS["linbreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, optimizer, coarse_steps=3, fine_steps=1)
    for i in range(6):
        x, y = batch(i)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + 0.1 * model[0].weight.square().sum()).backward()
        held = optimizer.param_groups[0]["params"][0].grad
        twin = copy.deepcopy(model)
        twin.zero_grad()
        (F.cross_entropy(twin(x), y) + 0.1 * twin[0].weight.square().sum()).backward()
        wanted = twin[0].weight.grad
        assert wanted is not None
        if levels.restricted:
            wanted = levels._exchange.parts[0].live.where.restrict(wanted)
        torch.testing.assert_close(held, wanted)
        optimizer.step()
        levels.step()


def test_by_default_small_networks_are_left_alone() -> None:
    model, twin = mlp(), mlp()
    a = OPTIMIZERS["adabreg"](tb.param_groups(model, tb.L1(), lam=0.05))
    b = OPTIMIZERS["adabreg"](tb.param_groups(twin, tb.L1(), lam=0.05))
    levels = tb.Multilevel(model, a)
    train(model, a, range(30), levels.step)
    train(twin, b, range(30))
    assert levels.counts == {"fine": 30, "coarse": 0}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.skipif(not kernels.available(), reason="needs numba")
def test_a_short_batch_does_not_decide_what_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch of an epoch may be too small for sparse products to pay off."""

    def seconds(_: Any, key: str, __: Any) -> float:
        return 1.0 if "dense" in key else 0.5 if "9, 12" in key else 2.0

    monkeypatch.setattr(choice.Timings, "_time", seconds)
    model = mlp()
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1(), lam=0.01), lr=0.01)
    levels = tb.Multilevel(model, optimizer)
    for i in range(40):
        x, y = batch(i)
        n = 4 if i == 20 else 9  # in the fine step before a coarse phase
        optimizer.zero_grad()
        F.cross_entropy(model(x[:n]), y[:n]).backward()
        optimizer.step()
        levels.step()
    assert levels.counts == {"fine": 4, "coarse": 36}


def test_bad_arguments_are_named() -> None:
    model = mlp()
    optimizer = tb.LinBreg(tb.param_groups(model, tb.L1(), lam=0.05))
    with pytest.raises(ValueError, match=r"`coarse_steps`: -1; expected a whole number of at least 0"):
        tb.Multilevel(model, optimizer, coarse_steps=-1)
    with pytest.raises(ValueError, match=r"`fine_steps`: 0; expected a whole number of at least 1"):
        tb.Multilevel(model, optimizer, fine_steps=0)
    with pytest.raises(ValueError, match=r"`boost`: 0"):
        tb.Multilevel(model, optimizer, boost=0)
    with pytest.raises(ValueError, match=r"`optimizer`: SGD; expected LinBreg or AdaBreg"):
        tb.Multilevel(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`optimizer`: ProxSGD"):
        tb.Multilevel(model, tb.ProxSGD(model.parameters()))
    with pytest.raises(ValueError, match=r"`model`: list"):
        tb.Multilevel([model], optimizer)  # type: ignore[arg-type]
    tb.Multilevel(model, optimizer, 3)
    with pytest.raises(ValueError, match="belongs to another Multilevel"):
        tb.Multilevel(model, optimizer)
