"""The fused step against the readable one: same weights, same memory of the dual, same support."""

from __future__ import annotations

import copy
import functools
import pickle
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import ENTRYWISE, FLOATS, ElasticNet, pairwise, same, through_disk, with_rates
from torch import Tensor, nn

pytest.importorskip("numba")

from numba.core import event

import torch_bregman as tb
from torch_bregman import kernels
from torch_bregman.optim.onepass import cpu, groups, plans
from torch_bregman.regularizers import group_dims

Shape = tuple[int, ...]

# ---------------------------------------------------------------------- the tables


OPTIMIZERS = with_rates(
    {
        "linbreg": 0.02,
        "linbreg-paper": 0.05,
        "linbreg-sgd": 0.005,
        "linbreg-nesterov": 0.005,
        "adabreg": 0.02,
        "adabreg-decoupled": 0.02,
        "proxsgd": 0.02,
        "proxsgd-momentum": 0.005,
        "proxsgd-nesterov": 0.005,
    }
)
DUAL = [kind for kind in OPTIMIZERS if not kind.startswith("prox")]
LAM = 0.1

INDEX = torch.arange(37 * 53).reshape(37, 53) * 7 % 11
LINEAR: tuple[Shape, ...] = ((37, 53), (5, 3), (0, 3))
CONV: tuple[Shape, ...] = ((11, 7, 3, 3), (20, 16, 5, 5), (6, 5, 7), (0, 3, 3, 3))
ANY: tuple[Shape, ...] = ((37, 53), (5,), (3, 4, 3, 3), (), (0, 3))
LARGE = {2: (300, 1000), 4: (128, 256, 3, 3)}
assert all(np.prod(shape) > groups.SMALL for shape in LARGE.values())

GROUPED: dict[str, Callable[[], tb.Regularizer]] = {
    **{f"group-{name}": functools.partial(tb.GroupL1, name) for name in ("rows", "columns")},
    **{f"group-{name}": functools.partial(tb.GroupL1, name) for name in ("kernels", "filters", "channels")},
    **{f"sparse-{name}": functools.partial(tb.SparseGroupL1, name, l1_ratio=0.3) for name in ("rows", "columns")},
    **{
        f"sparse-{name}": functools.partial(tb.SparseGroupL1, name, l1_ratio=0.3)
        for name in ("kernels", "filters", "channels")
    },
    "group-rows-unweighted": lambda: tb.GroupL1("rows", weighted=False),
    "group-columns-unweighted": lambda: tb.GroupL1("columns", weighted=False),
    "group-channels-unweighted": lambda: tb.GroupL1("channels", weighted=False),
}
OTHERS: dict[str, Callable[[], tb.Regularizer]] = {
    "group-index": lambda: tb.GroupL1(INDEX),
    "nuclear": tb.NuclearNorm,
    "elastic-net": ElasticNet,
}
REGULARISERS = {**ENTRYWISE, **GROUPED, **OTHERS}
SOME = [
    "none",
    "l1",
    "nonnegative",
    "group-rows",
    "sparse-columns",
    "group-filters",
    "sparse-channels",
    "group-kernels",
]
TOLERANCE = {torch.float32: (1e-5, 1e-7), torch.float64: (1e-12, 1e-14), torch.bfloat16: (0.0, 0.0)}

every_optimizer = pytest.mark.parametrize("kind", list(OPTIMIZERS))
every_dual = pytest.mark.parametrize("kind", DUAL)


def waits(kind: str, dtype: torch.dtype, **_: Any) -> bool:
    """A kernel takes seconds to compile, so some optimizers in float64 wait for `-m slow`."""
    return dtype == torch.float64 and kind not in ("linbreg", "adabreg", "proxsgd")


def in_either_dtype(kinds: list[str]) -> dict[str, tuple[str, torch.dtype]]:
    """Every optimizer in float32 and float64, as values of "kind,dtype": they meet with all others as one option."""
    return {f"{kind}-{name}": (kind, dtype) for kind in kinds for name, dtype in FLOATS.items()}


def shapes_of(name: str, *, large: bool = False) -> tuple[Shape, ...]:
    if name in ENTRYWISE or name == "elastic-net":
        return (*ANY, *([LARGE[2]] if large else []))
    if name in ("group-index", "nuclear"):
        return ((37, 53),)
    linear = "rows" in name or "columns" in name
    return (*(LINEAR if linear else CONV), *([LARGE[2 if linear else 4]] if large else []))


def start(reg: tb.Regularizer | None, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A sparse weight; about a fifth of the entries or groups are alive."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
    if isinstance(reg, tb.NuclearNorm):
        return (w[:, :1] @ w[:1] * 10).to(dtype)
    groups = getattr(reg, "groups", None)
    alive = list(shape)
    if isinstance(groups, str):
        for d in group_dims(groups, shape):
            alive[d] = 1
    keep = torch.rand(alive, generator=generator) < 0.2
    if isinstance(groups, Tensor):
        keep = groups < 2
    if keep.numel() < 8:  # so that no seed makes it dense
        keep = torch.arange(keep.numel()).reshape(alive) == 1
    w = w * keep
    if isinstance(reg, tb.SparseGroupL1):
        w = w * (torch.rand(shape, generator=generator) < 0.7)
    return (w.abs() if isinstance(reg, tb.NonNegativeL1) else w).to(dtype)


@functools.lru_cache(maxsize=64)
def gradients(shape: Shape, steps: int = 10, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    """Drift and noise; the drift differs between rows and between columns, so that groups come alive one by one."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(shape, generator=generator, dtype=dtype)
    for d in range(min(2, len(shape))):
        size = [shape[d] if i == d else 1 for i in range(len(shape))]
        drift = drift * (0.2 + 1.3 * torch.rand(size, generator=generator, dtype=dtype))
    return [drift + 0.7 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(steps)]


class Twins:
    """One optimizer with the readable step, one with the fused, on equal weights."""

    def __init__(self, kind: str, starts: list[Tensor], reg: tb.Regularizer | None = None, **options: Any) -> None:
        cls, defaults = OPTIMIZERS[kind]
        self.params = [[nn.Parameter(w.detach().clone()) for w in starts] for _ in range(2)]
        options = {"lam": LAM, **defaults, **options, "regularizer": reg}
        self.both = [
            cls(self.params[0], foreach=False, **copy.deepcopy(options)),
            cls(self.params[1], fused=True, **copy.deepcopy(options)),
        ]
        self.readable, self.fused = self.both

    def step(self, grads: list[Tensor | None]) -> None:
        for params, optimizer in zip(self.params, self.both, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g
            optimizer.step()

    def walk(self, steps: int = 10, seed: int = 1) -> None:
        each = [gradients(tuple(p.shape), steps, p.dtype, seed) for p in self.params[0]]
        for grads in zip(*each, strict=True):
            self.step(list(grads))

    def set(self, **options: Any) -> None:
        for optimizer in self.both:
            optimizer.param_groups[0].update(copy.deepcopy(options))

    def edit(self, change: Callable[[Tensor], Any]) -> None:
        for params in self.params:
            for p in params:
                change(p)

    def check(self, tolerance: tuple[float, float] | None = None, *, state: bool = True) -> None:
        for p, q in zip(*self.params, strict=True):
            assert torch.equal(p != 0, q != 0), (
                f"support of {tuple(p.shape)}: {int(((p != 0) != (q != 0)).sum())} differ"
            )
            rtol, atol = tolerance or TOLERANCE[p.dtype]
            dual = self.readable.state.get(p, {}).get("dual")
            if atol and dual is not None and dual.isfinite().any():  # θ is as exact as v, from which it comes
                atol = max(atol, 4 * torch.finfo(dual.dtype).eps * float(dual[dual.isfinite()].abs().max()))
            torch.testing.assert_close(q.detach(), p.detach(), rtol=rtol, atol=atol, equal_nan=True)
            if not state or not p.numel():
                continue
            mine, theirs = self.readable.state[p], self.fused.state[q]
            assert set(mine) == set(theirs)
            for name, value in mine.items():
                if name == "written":  # a sum over the bits of θ
                    continue
                if isinstance(value, Tensor) and value.shape == p.shape:
                    torch.testing.assert_close(theirs[name], value, rtol=rtol, atol=atol, equal_nan=True)
                else:
                    assert torch.as_tensor(theirs[name]).equal(torch.as_tensor(value)), name


def twins(kind: str, name: str, dtype: torch.dtype = torch.float32, *, large: bool = False, **options: Any) -> Twins:
    reg = REGULARISERS[name]()
    starts = [start(reg, shape, dtype, seed) for seed, shape in enumerate(shapes_of(name, large=large))]
    return Twins(kind, starts, reg, **options)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The passes of the kernel that ran since the test began, and the writes of groups."""
    calls: list[tuple[str, str]] = []
    run, write = cpu.CpuPlan.run, groups.GroupPlan.write

    def recorded_run(self: cpu.CpuPlan, rule: str, mode: str) -> None:
        calls.append((rule, mode))
        run(self, rule, mode)

    def recorded_write(self: groups.GroupPlan, *args: Any) -> None:
        calls.append(("groups", "WRITE"))
        write(self, *args)

    monkeypatch.setattr(cpu.CpuPlan, "run", recorded_run)
    monkeypatch.setattr(groups.GroupPlan, "write", recorded_write)
    return calls


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------- fused against readable

DECAYS = {"plain": 0.0, "decay": 0.1}
SIGNS = {"minimize": False, "maximize": True}


def course(pair: Twins, kind: str) -> None:
    """Ten steps in which λ and lr change."""
    lam, lr = pair.readable.param_groups[0]["lam"], OPTIMIZERS[kind][1]["lr"]
    before = [p.detach() != 0 for p in pair.params[0]]
    pair.walk(4)
    pair.set(lam=1.3 * lam)
    pair.walk(3, seed=2)
    pair.set(lr=0.5 * lr)
    pair.walk(3, seed=3)
    if pair.readable.param_groups[0]["regularizer"] != "none":
        moved = [(p != 0).flatten() != live.flatten() for p, live in zip(pair.params[0], before, strict=True)]
        assert torch.cat(moved).any(), "no support changed, so this tests little"
        assert any(0 < int((p != 0).sum()) < p.numel() for p in pair.params[0]), "all dead or all alive"


@pairwise(
    {
        "kind": list(OPTIMIZERS), "dtype": FLOATS, "name": list(ENTRYWISE), "decay": DECAYS, "maximize": SIGNS,
        "delta": [1.0, 0.7], "large": [False, True],
    },
    where=lambda kind, delta, **_: not kind.startswith("prox") or delta == 1,  # ProxSGD has no δ
    slow=waits,
    strength=3,
)  # fmt: skip
def test_entrywise(
    kind: str, dtype: torch.dtype, name: str, decay: float, maximize: bool, delta: float, large: bool, ran: list[Any]
) -> None:
    more = {} if kind.startswith("prox") else {"delta": delta}
    pair = twins(kind, name, dtype, large=large, weight_decay=decay, maximize=maximize, **more)
    course(pair, kind)
    pair.check()
    assert {mode for _, mode in ran} == {"PRIMAL" if kind.startswith("prox") else "BOTH"}
    assert len(ran) == 10


@pairwise(
    {
        "kind,dtype": in_either_dtype(DUAL), "name": list(GROUPED), "decay": DECAYS, "maximize": SIGNS,
        "delta": [1.0, 0.7], "large": [False, True],
    },
    where=lambda kind, large, **_: kind in ("linbreg", "adabreg") or not large,
    slow=waits,
)  # fmt: skip
def test_groups(
    kind: str, dtype: torch.dtype, name: str, decay: float, maximize: bool, delta: float, large: bool, ran: list[Any]
) -> None:
    lam = (0.07 if kind.startswith("adabreg") else 0.08) * {"group-channels-unweighted": 12.0}.get(
        name, 6.0 if "unweighted" in name else 1.0
    )
    pair = twins(kind, name, dtype, large=large, lam=lam, weight_decay=decay, maximize=maximize, delta=delta)
    course(pair, kind)
    pair.check()
    assert {mode for _, mode in ran} == {"DUAL", "WRITE"}
    assert ran.count(("groups", "WRITE")) == 10 * sum(p.numel() > 0 for p in pair.params[1])


@pairwise(
    {
        "kind,dtype": in_either_dtype(DUAL), "name": list(OTHERS), "decay": DECAYS, "maximize": SIGNS,
        "delta": [1.0, 0.7],
    },
    slow=waits,
)  # fmt: skip
def test_readable_prox_after_a_fused_move(
    kind: str, dtype: torch.dtype, name: str, decay: float, maximize: bool, delta: float, ran: list[Any]
) -> None:
    pair = twins(kind, name, dtype, weight_decay=decay, maximize=maximize, delta=delta)
    pair.walk(4)
    pair.set(lam=1.3 * LAM)
    pair.walk(6, seed=2)
    if name == "nuclear":  # its zeros are singular values; the entries are rounded
        for p, q in zip(*pair.params, strict=True):
            rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (1e-11, 1e-12)
            torch.testing.assert_close(q.detach(), p.detach(), rtol=rtol, atol=atol)
    else:
        pair.check()
    assert {mode for _, mode in ran} == {"DUAL"}


@pytest.mark.parametrize("name", ["group-rows", "sparse-channels", "group-index", "elastic-net"])
def test_proxsgd_with_groups_takes_the_readable_step(name: str, ran: list[Any]) -> None:
    pair = twins("proxsgd-momentum", name)
    pair.walk()
    pair.check((0, 0))
    assert not ran


@pytest.mark.parametrize("name", ["l1", "nonnegative", "group-rows", "sparse-columns", "elastic-net"])
@every_optimizer
def test_lam_per_entry(kind: str, name: str) -> None:
    lam = LAM * torch.linspace(0.5, 1.5, 37).unsqueeze(1)
    reg = REGULARISERS[name]()
    pair = Twins(kind, [start(reg, (37, 53))], reg, lam=lam)
    pair.walk(5)
    for optimizer in pair.both:
        optimizer.param_groups[0]["lam"].mul_(0.8)
    pair.walk(5, seed=2)
    pair.check()


@pytest.mark.parametrize("name", ["l1", "nonnegative", "group-rows", "sparse-columns"])
@every_optimizer
def test_options_as_one_element_tensors(kind: str, name: str, ran: list[Any]) -> None:
    lr = torch.tensor([OPTIMIZERS[kind][1]["lr"]], dtype=torch.float64)
    more = {} if kind.startswith("prox") else {"delta": torch.tensor(0.7)}
    pair = twins(kind, name, lr=lr, lam=torch.tensor(LAM), **more)
    pair.walk(5)
    for optimizer in pair.both:  # changed in place, as a schedule does
        optimizer.param_groups[0]["lr"].mul_(0.5)
        optimizer.param_groups[0]["lam"].mul_(1.2)
    pair.walk(5, seed=2)
    pair.check()
    assert bool(ran) == (name in ENTRYWISE or not kind.startswith("prox"))


@pytest.mark.parametrize("name", SOME)
def test_delta_changes_on_the_way(name: str) -> None:
    pair = twins("linbreg", name, large=True)
    for delta in (0.5, 2.0, 1.0):
        pair.set(delta=delta)
        pair.walk(2)
    pair.check()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["linbreg", "linbreg-sgd", "adabreg"])
def test_lam_falls_to_zero_and_rises_again(kind: str, name: str) -> None:
    pair = twins(kind, name)
    for lam in (0.0, 0.2, 1e-30, 0.1):
        pair.set(lam=lam)
        pair.walk(2)
        pair.check()


@pytest.mark.parametrize("name", ["l1", "group-rows"])
@every_dual
def test_parameters_without_a_gradient_are_left_alone(kind: str, name: str) -> None:
    pair = twins(kind, name, large=True)
    each = [gradients(tuple(p.shape)) for p in pair.params[0]]
    for k, grads in enumerate(zip(*each, strict=True)):
        idle = pair.params[1][k % 3].detach().clone()
        pair.step([None if i == k % 3 else g for i, g in enumerate(grads)])
        same(pair.params[1][k % 3], idle)
    pair.check()


@pytest.mark.parametrize("name", SOME)
@every_optimizer
def test_the_two_may_alternate(kind: str, name: str) -> None:
    pair = twins(kind, name, large=name == "l1")
    for k in range(6):
        pair.fused.param_groups[0]["fused"] = k % 3 != 1
        pair.walk(2, seed=k)
    pair.check()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["linbreg", "adabreg"])
def test_a_new_lam_is_obeyed_where_the_two_alternate(kind: str, name: str) -> None:
    """What the one wrote is no edit to the other, though the last bits of group norms differ."""
    pair = twins(kind, name)
    for k, lam in enumerate((0.1, 0.05, 0.15, 0.1)):
        pair.set(lam=lam)
        pair.fused.param_groups[0]["fused"] = k % 2 == 0
        pair.walk(3, seed=k)
        pair.check()


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["linbreg", "adabreg"])
def test_a_new_lam_is_obeyed_after_loading(kind: str, name: str) -> None:
    pair = twins(kind, name)
    pair.walk(4)
    other, copies = resumed(pair.fused, pair.params[1], through_disk)
    pair.both[1], pair.fused, pair.params[1] = other, other, copies
    pair.set(lam=0.5 * LAM)
    pair.walk(3, seed=2)
    pair.check()


def test_groups_have_their_own_options() -> None:
    names = ["l1", "none", "group-rows", "nonnegative", "sparse-columns"]
    starts = [start(REGULARISERS[name](), (37, 53), seed=i) for i, name in enumerate(names)]
    both = []
    for options in ({"foreach": False}, {"fused": True}):
        groups = [
            {
                "params": [nn.Parameter(w.clone())],
                "regularizer": REGULARISERS[n](),
                "lam": 0.05 * (i + 1),
                "lr": 0.01 + i / 99,
            }
            for i, (n, w) in enumerate(zip(names, starts, strict=True))
        ]
        optimizer = tb.LinBreg(groups, **options)
        for g in gradients((37, 53)):
            for group in optimizer.param_groups:
                group["params"][0].grad = g
            optimizer.step()
        both.append([group["params"][0].detach() for group in optimizer.param_groups])
    for p, q in zip(*both, strict=True):
        assert torch.equal(p != 0, q != 0)
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)


def test_a_group_added_later() -> None:
    pair = twins("adabreg", "l1")
    pair.walk(3)
    for params, optimizer in zip(pair.params, pair.both, strict=True):
        params.append(nn.Parameter(start(tb.GroupL1("rows"), (40, 30))))
        optimizer.add_param_group({"params": [params[-1]], "regularizer": tb.GroupL1("rows"), "lam": 0.05})
    pair.walk(4, seed=2)
    pair.check()


def test_closure_and_loss() -> None:
    p = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))
    optimizer = tb.LinBreg([p], lr=0.1, fused=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p - 2).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[0] == 9
    assert losses == sorted(losses, reverse=True)


# ---------------------------------------------------------------------- weights changed from outside


def in_place(change: Callable[[Tensor], Any]) -> Callable[[Tensor], None]:
    def edit(p: Tensor) -> None:
        with torch.no_grad():
            change(p)

    return edit


def live_entry(p: Tensor) -> Any:
    return tuple(p.detach().nonzero()[0].tolist()) if int((p != 0).sum()) else None


def kill_entry(p: Tensor) -> None:
    at = live_entry(p)
    if at is not None:
        p[at] = 0.0


def wake_entry(p: Tensor) -> None:
    """One zero gets a value."""
    zeros = (p.detach() == 0).nonzero()
    if len(zeros):
        p[tuple(zeros[len(zeros) // 2].tolist())] = 0.3


def wake_many(p: Tensor) -> None:
    flat = p.view(-1)
    flat[::3] = torch.where(flat[::3] == 0, 0.02, flat[::3])


def rewrite(p: Tensor) -> None:
    p.copy_(p.flip(0) if p.dim() else p)


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "mul": in_place(lambda p: p.mul_(0.5)),
    "negate": in_place(lambda p: p.mul_(-1)),
    "clamp": in_place(lambda p: p.clamp_(-0.05, 0.05)),
    "zero": in_place(lambda p: p.zero_()),
    "data-mul": lambda p: p.data.mul_(0.5),
    "data-clamp": lambda p: p.data.clamp_(-0.05, 0.05),
    "kill": in_place(kill_entry),
    "data-kill": lambda p: kill_entry(p.data),
    "wake": in_place(wake_entry),
    "wake-many": in_place(wake_many),
    "rewrite": in_place(rewrite),
    "storage": lambda p: setattr(p, "data", p.data.clone() * 0.5),
}
SEEN_LATE = {"data-wake": lambda p: wake_entry(p.data), "data-wake-many": lambda p: wake_many(p.data)}


@pairwise(
    {
        "kind": ["linbreg", "linbreg-nesterov", "adabreg", "proxsgd"], "name": SOME, "edit": [*EDITS, *SEEN_LATE],
        "large": [False, True],
    },
    where=lambda kind, name, edit, large: (
        not (name == "none" and "wake" in edit)  # no weight is zero there
        and (not large or (kind == "linbreg" and edit in EDITS))
    ),
)  # fmt: skip
def test_an_edit_is_honoured_as_in_the_readable_step(kind: str, name: str, edit: str, large: bool) -> None:
    options = {"lam": 1.5} if kind == "proxsgd" else {"delta": 0.7}
    pair = twins(kind, name, large=large, **options)
    pair.walk(4)
    before = [p.detach().clone() for p in pair.params[1]]
    pair.edit({**EDITS, **SEEN_LATE}[edit])
    assert any(not torch.equal(p, w) for p, w in zip(pair.params[1], before, strict=True))
    pair.walk(3, seed=2)
    pair.check()


@pairwise({"name": SOME, "edit": ["mul", "data-mul", "wake-many"], "lam": [0.0, 0.05, 0.3]})
def test_an_edit_together_with_a_new_lam(lam: float, name: str, edit: str) -> None:
    pair = twins("linbreg", name)
    pair.walk(4)
    pair.edit(EDITS[edit])
    pair.set(lam=lam, delta=0.8)
    pair.walk(3, seed=2)
    pair.check()


@pytest.mark.parametrize("name", SOME)
def test_an_edit_before_a_step_with_zero_gradient_stays(name: str) -> None:
    pair = twins("linbreg", name, large=True)
    pair.walk(4)
    pair.edit(EDITS["wake-many"] if name != "group-rows" else EDITS["mul"])
    edited = [p.detach().clone() for p in pair.params[1]]
    pair.step([torch.zeros_like(p) for p in pair.params[0]])
    for p, w in zip(pair.params[1], edited, strict=True):
        assert torch.equal(p != 0, w != 0)
        torch.testing.assert_close(p.detach(), w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["linbreg", "adabreg"])
def test_loading_a_module_is_an_edit(kind: str) -> None:
    cls, options = OPTIMIZERS[kind]
    both = []
    for more in ({"foreach": False}, {"fused": True}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(600, 500, bias=False), nn.Linear(500, 3, bias=False))
        tb.sparse_init_(model, 0.1)
        saved = copy.deepcopy(model.state_dict())
        optimizer = cls(model.parameters(), regularizer=tb.L1(), lam=LAM, **options, **more)
        params = list(model.parameters())
        for k in range(6):
            for i, p in enumerate(params):
                p.grad = gradients(tuple(p.shape), 6, seed=i)[k]
            if k == 3:
                model.load_state_dict(saved)
            optimizer.step()
        both.append([(p.detach(), optimizer.state[p]["dual"]) for p in params])
    for (p, v), (q, u) in zip(*both, strict=True):
        assert torch.equal(p != 0, q != 0)
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(u, v, rtol=1e-5, atol=1e-7)


def one_live_row(shape: Shape = (1024, 512), dtype: torch.dtype = torch.float32) -> tuple[nn.Parameter, Tensor]:
    """A large weight, alive in its first row only; and a zero gradient."""
    w = torch.zeros(shape, dtype=dtype)
    w[0] = 0.5
    assert w.numel() > groups.SMALL
    return nn.Parameter(w), torch.zeros_like(w)


@pairwise({"kind": DUAL, "dtype": FLOATS}, slow=waits)
def test_an_entry_set_past_torch_in_a_dead_line_is_followed_in_time(kind: str, dtype: torch.dtype) -> None:
    cls, options = OPTIMIZERS[kind]
    p, zero = one_live_row(dtype=dtype)
    optimizer = cls([p], regularizer=tb.L1(), lam=LAM, fused=True, **{**options, "weight_decay": 0.0})
    p.grad = zero
    for _ in range(3):
        optimizer.step()
    p.data[700, 101] = 0.25
    p.data[1023, 511] = -0.25
    dual = optimizer.state[p]["dual"]
    followed = []
    for _ in range(64):
        optimizer.step()
        assert p[700, 101].item() == pytest.approx(0.25, rel=1e-6)
        assert p[1023, 511].item() == pytest.approx(-0.25, rel=1e-6)
        followed.append(bool(dual[700, 101] != 0) and bool(dual[1023, 511] != 0))
    assert followed[-1]
    assert dual[700, 101].item() == pytest.approx(0.25 + LAM, rel=1e-6)
    assert dual[1023, 511].item() == pytest.approx(-0.25 - LAM, rel=1e-6)
    assert int((p != 0).sum()) == 512 + 2
    p.grad = torch.full_like(p, 1e-4)  # and it trains like the others from here
    optimizer.step()
    assert 0.2 < p[700, 101].item() < 0.25


def test_an_entry_set_past_torch_outlives_the_birth_of_its_neighbour() -> None:
    """The neighbour in the same cache line comes alive in the next step, before the line was looked at."""
    p, g = one_live_row()
    optimizer = tb.LinBreg([p], lr=1.0, regularizer=tb.L1(), lam=LAM, fused=True)
    p.grad = g
    for _ in range(3):
        optimizer.step()
    places = [100, 300, 500, 700, 900]  # one of the chunks may be looked at by chance, not all
    for row in places:
        p.data[row, 100] = 0.25
    p.grad = torch.zeros_like(p)
    p.grad[:, 101] = -0.5
    optimizer.step()
    assert p[places, 101].tolist() == pytest.approx([0.4] * 5)
    assert p[places, 100].tolist() == pytest.approx([0.25] * 5)


@pytest.mark.parametrize(
    ("groups", "shape"),
    [("rows", (1024, 512)), ("columns", (512, 1024)), ("filters", (512, 64, 3, 3)), ("channels", (64, 512, 3, 3))],
)
def test_an_entry_set_past_torch_in_a_dead_group_is_followed_in_time(groups: str, shape: Shape) -> None:
    w = torch.zeros(shape)
    w[:, 0] = 0.5 if groups in ("columns", "channels") else 0.0
    w[0] = 0.5 if groups in ("rows", "filters") else w[0]
    p = nn.Parameter(w)
    optimizer = tb.LinBreg([p], lr=0.1, regularizer=tb.GroupL1(groups), lam=0.01, fused=True)
    p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    at = (40, 40, *[1] * (len(shape) - 2))
    p.data[at] = 0.25
    for _ in range(64):
        optimizer.step()
        assert p[at].item() == pytest.approx(0.25, rel=1e-5)
    assert optimizer.state[p]["dual"][at].item() > 0.25


def test_an_entry_of_a_small_tensor_is_followed_at_once() -> None:
    p = nn.Parameter(torch.zeros(64, 64))
    optimizer = tb.LinBreg([p], lr=1.0, regularizer=tb.L1(), lam=LAM, fused=True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    p.data[40, 3] = 0.25
    optimizer.step()
    assert optimizer.state[p]["dual"][40, 3].item() == pytest.approx(0.25 + LAM)
    assert p[40, 3].item() == pytest.approx(0.25)


# ---------------------------------------------------------------------- the support comes and goes


@pytest.mark.parametrize(
    ("kind", "name", "lr", "lam"),
    [
        ("linbreg", "l1", 0.03, 0.1),
        ("linbreg", "nonnegative", 0.03, 0.1),
        ("linbreg-sgd", "l1", 0.01, 0.1),
        ("adabreg", "l1", 0.01, 0.02),
        ("proxsgd", "l1", 0.03, 0.6),
        ("linbreg", "group-rows", 0.03, 0.05),
        ("linbreg", "group-columns", 0.03, 0.05),
        ("linbreg", "sparse-rows", 0.03, 0.05),
        ("linbreg", "sparse-columns", 0.03, 0.05),
    ],
)
def test_lines_come_alive_and_die(kind: str, name: str, lr: float, lam: float) -> None:
    shape = (1024, 512)
    generator = torch.Generator().manual_seed(3)
    unit: Callable[[Tensor], Tensor]
    if "rows" in name:
        phase, unit = torch.rand(1024, 1, generator=generator), lambda p: p.any(1)
    elif "columns" in name:
        phase, unit = torch.rand(1, 512, generator=generator), lambda p: p.any(0)
    else:
        phase, unit = torch.rand(1024, 32, generator=generator), lambda p: p.view(-1, 16).any(1)
        phase = phase.repeat_interleave(16, 1)
    strength = torch.rand(phase.shape, generator=generator).roll(1, 0)
    base = torch.randn(shape, generator=generator) * strength * (torch.rand(shape, generator=generator) < 0.4)
    if name == "l1":
        base = base * (torch.rand(1024, 32, generator=generator) < 0.5).repeat_interleave(16, 1)
    reg = REGULARISERS[name]()
    pair = Twins(kind, [start(reg, shape) * 0.1], reg, lr=lr, lam=lam)
    born = died = 0
    alive = unit(pair.params[0][0].detach() != 0)
    for k in range(40):
        pair.step([base * torch.cos(2 * torch.pi * (k / 20 + phase))])
        pair.check(state=False)
        now = unit(pair.params[0][0].detach() != 0)
        born, died, alive = born + int((now & ~alive).sum()), died + int((alive & ~now).sum()), now
    pair.check()
    assert min(born, died) > 50, (born, died)


def test_alive_line_memory_is_right_at_every_place() -> None:
    """One weight wanders through a large tensor: its line comes alive and the one before it dies."""
    w = torch.zeros(300, 1000)
    pair = Twins("linbreg", [w], tb.L1(), lr=1.0, lam=LAM)
    places = [0, 15, 16, 4095, 8191, 8192, 131071, 131072, 262143, 262144, 299983, 299984, 299999]
    for i, place in enumerate(places):
        g = torch.zeros(300_000)
        g[place] = -1.0
        if i:
            g[places[i - 1]] = 1.0
        pair.step([g.view(300, 1000)])
        for params in pair.params:
            assert params[0].detach().view(-1).nonzero().flatten().tolist() == [place]
    pair.check()


# ---------------------------------------------------------------------- layout in memory


@pairwise(
    {
        "name": ["l1", "group-filters", "group-channels", "group-kernels", "sparse-channels"],
        "shape": {"small": (11, 7, 3, 3), "large": (128, 256, 3, 3)},
        "contiguous_gradient": [False, True],
    }
)
def test_channels_last(name: str, shape: Shape, contiguous_gradient: bool, ran: list[Any]) -> None:
    reg = REGULARISERS[name]()
    pair = Twins("linbreg-paper", [start(reg, shape).to(memory_format=torch.channels_last)], reg)
    (p,) = pair.params[1]
    for g in gradients(shape, 6):
        pair.step([g if contiguous_gradient else g.to(memory_format=torch.channels_last)])
    pair.check()
    assert p.is_contiguous(memory_format=torch.channels_last)
    assert pair.fused.state[p]["dual"].stride() == p.stride()
    assert ran


def test_layout_changed_on_the_way() -> None:
    pair = Twins("adabreg", [start(tb.L1(), (32, 16, 3, 3)), torch.zeros(32)], tb.L1())
    for to in (torch.channels_last, torch.contiguous_format, torch.channels_last):
        pair.walk(3)
        for params in pair.params:
            params[0].data = params[0].data.contiguous(memory_format=to)
    pair.walk(2)
    pair.check()


@pairwise(
    {
        "kind": ["linbreg", "linbreg-sgd", "adabreg", "proxsgd"],
        "name": ["l1", "group-rows"],
        "layout": {
            "transposed": lambda g: g.t().contiguous().t(),
            "strided": lambda g: torch.stack([g, g], -1)[..., 0],
            "zeros": lambda g: torch.zeros(1).expand(g.shape),
            "one row": lambda g: g[:1].expand(g.shape),
            "offset": lambda g: torch.cat([torch.zeros(1), g.reshape(-1)])[1:].view(g.shape),
        },
    }
)
def test_gradient_layout(kind: str, name: str, layout: Callable[[Tensor], Tensor], ran: list[Any]) -> None:
    pair = Twins(kind, [start(REGULARISERS[name](), (37, 53))], REGULARISERS[name](), weight_decay=0.1)
    for g in gradients((37, 53), 5):
        pair.step([layout(g)])
    pair.check()
    assert bool(ran) == (kind != "proxsgd" or name == "l1")


@pairwise({"name": ["l1", "group-rows", "group-columns", "sparse-rows"], "offset": [1, 3, 5, 8], "dtype": FLOATS})
def test_views_into_one_buffer(name: str, offset: int, dtype: torch.dtype, ran: list[Any]) -> None:
    """Lines that begin anywhere; what lies between the parameters is not touched."""
    reg, shapes = REGULARISERS[name](), [(37, 53), (5, 3), (64, 16), (300, 1000)]
    pair = Twins("adabreg", [start(reg, shape, dtype, seed) for seed, shape in enumerate(shapes)], reg)
    total = sum(p.numel() + offset for p in pair.params[1]) + offset
    buffer = torch.full((total,), 7.0, dtype=dtype)
    gaps, at = torch.ones(total, dtype=torch.bool), offset
    for p in pair.params[1]:
        view = buffer[at : at + p.numel()].view(p.shape)
        view.copy_(p.detach())
        p.data = view
        gaps[at : at + p.numel()] = False
        at += p.numel() + offset
    pair.walk(6)
    pair.check()
    assert bool((buffer[gaps] == 7).all())
    assert bool((buffer[~gaps] != 7).all())
    assert pair.params[1][0].data_ptr() == buffer.data_ptr() + offset * buffer.element_size()
    assert ran


@pytest.mark.parametrize("name", ["none", "l1", "group-rows"])
@pytest.mark.parametrize("kind", ["linbreg-paper", "adabreg"])
def test_what_the_kernel_does_not_know_takes_the_readable_step(kind: str, name: str, ran: list[Any]) -> None:
    reg = REGULARISERS[name]()
    w = start(reg, (37, 53))
    for strange in (w.t().contiguous().t(), w.to(torch.bfloat16)):
        pair = Twins(kind, [strange, start(reg, (20, 30))], reg)
        pair.walk(5)
        pair.check((0, 0))
    for params in (pair := Twins(kind, [w], reg)).params:
        params[0].data = torch.zeros(37, 106)[:, ::2].copy_(w)
    pair.walk(5)
    pair.check((0, 0))
    assert not ran


@pytest.mark.parametrize("name", ["l1", "group-rows"])
@pytest.mark.parametrize("kind", ["linbreg", "adabreg", "proxsgd"])
def test_two_dtypes_in_one_group(kind: str, name: str) -> None:
    reg = REGULARISERS[name]()
    starts = [start(reg, (37, 53), dtype, i) for i, dtype in enumerate([torch.float32, torch.float64] * 2)]
    pair = Twins(kind, starts, reg)
    pair.walk()
    pair.check()


# ---------------------------------------------------------------------- saved and loaded


def resumed(optimizer: Any, params: list[nn.Parameter], way: Callable[[Any], Any]) -> tuple[Any, list[nn.Parameter]]:
    """Another optimizer on copies of the parameters, with the state of the first."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = type(optimizer)(copies, regularizer=optimizer.regularizers[0], lr=0.5, fused=True)
    other.load_state_dict(way(optimizer.state_dict()))
    return other, copies


def walk(optimizer: Any, params: list[nn.Parameter], steps: int = 4, seed: int = 1) -> None:
    each = [gradients(tuple(p.shape), steps, p.dtype, seed) for p in params]
    for grads in zip(*each, strict=True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()


def assert_same_run(a: Any, b: Any) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        same(q, p)
        assert set(a.state[p]) == set(b.state[q])
        for name, value in a.state[p].items():
            same(torch.as_tensor(b.state[q][name]), torch.as_tensor(value))


@pairwise(
    {
        "kind": list(OPTIMIZERS), "name": ["l1", "nonnegative", "group-rows", "sparse-channels"],
        "way": {"deepcopy": copy.deepcopy, "disk": through_disk},
    }
)  # fmt: skip
def test_a_loaded_run_goes_on_bit_for_bit(kind: str, name: str, way: Callable[[Any], Any]) -> None:
    pair = twins(kind, name, large=True)
    optimizer, params = pair.fused, pair.params[1]
    walk(optimizer, params)
    other, copies = resumed(optimizer, params, way)
    assert other.param_groups[0]["fused"] is True
    walk(optimizer, params, seed=2)
    walk(other, copies, seed=2)
    assert_same_run(optimizer, other)


@pairwise(
    {
        "kind": list(OPTIMIZERS), "name": ["l1", "group-rows"],
        "way": {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))},
    }
)  # fmt: skip
def test_a_copied_optimizer_goes_on_bit_for_bit(kind: str, name: str, way: Callable[[Any], Any]) -> None:
    pair = twins(kind, name)
    optimizer, params = pair.fused, pair.params[1]
    walk(optimizer, params)
    other = way(optimizer)
    copies = other.param_groups[0]["params"]
    walk(optimizer, params, seed=2)
    walk(other, copies, seed=2)
    assert_same_run(optimizer, other)


@pytest.mark.parametrize("name", ["l1", "nonnegative", "group-rows"])
@every_optimizer
def test_switching_between_the_two_through_a_state_dict(kind: str, name: str) -> None:
    pair = twins(kind, name, large=True)
    optimizer, params = pair.fused, pair.params[1]
    walk(optimizer, params)
    other, copies = resumed(optimizer, params, through_disk)
    walk(optimizer, params, seed=2)
    other.param_groups[0].update(fused=False, foreach=False)
    walk(other, copies, seed=2)
    back, again = resumed(other, copies, through_disk)
    back.param_groups[0].update(fused=True, foreach=None)
    walk(optimizer, params, seed=3)
    walk(back, again, seed=3)
    exact = not kind.startswith("adabreg") and name in ENTRYWISE
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p != 0, q != 0)
        rtol, atol = (0, 0) if exact else TOLERANCE[p.dtype]
        torch.testing.assert_close(q.detach(), p.detach(), rtol=rtol, atol=atol)
        if p.numel():
            assert set(optimizer.state[p]) == set(back.state[q])


def test_step_count_of_adabreg() -> None:
    pair = twins("adabreg", "l1")
    optimizer, params = pair.fused, pair.params[1]
    walk(optimizer, params, 7)
    other, copies = resumed(optimizer, params, through_disk)
    for o, ps in ((optimizer, params), (other, copies)):
        for p in ps:
            if p.numel():
                count = o.state[p]["step"]
                assert isinstance(count, Tensor)
                assert (count.dtype, count.shape, count.item()) == (torch.float32, (), 7.0)
    params[0].grad, rest = None, [p for p in params[1:] if p.numel()]
    optimizer.step()  # each tensor counts its own steps
    assert optimizer.state[params[0]]["step"].item() == 7
    assert {optimizer.state[p]["step"].item() for p in rest} == {8}


@every_optimizer
def test_two_optimizers_of_one_state_dict_share_nothing(kind: str) -> None:
    pair = twins(kind, "l1")
    optimizer, params = pair.fused, [p for p in pair.params[1] if p.numel()]
    optimizer.param_groups[0]["params"] = params
    walk(optimizer, params, 3)
    saved = optimizer.state_dict()
    one, its = resumed(optimizer, params, lambda x: saved)
    two, theirs = resumed(optimizer, params, lambda x: saved)

    def snapshot(o: Any, ps: list[nn.Parameter]) -> list[Tensor]:
        return [torch.as_tensor(value).clone() for p in ps for value in o.state[p].values()]

    before = snapshot(two, theirs)
    walk(optimizer, params, 2)
    walk(one, its, 2)
    for value, kept in zip(snapshot(two, theirs), before, strict=True):
        same(value, kept)
    walk(two, theirs, 2)
    assert_same_run(one, two)
    assert_same_run(one, optimizer)


# ---------------------------------------------------------------------- autograd


@pytest.mark.parametrize("name", ["l1", "none", "group-rows", "group-columns", "group-index"])
@every_optimizer
def test_autograd_notices_the_step(kind: str, name: str) -> None:
    reg = REGULARISERS[name]()
    cls, options = OPTIMIZERS[kind]
    p = nn.Parameter(start(reg, (37, 53)))
    optimizer = cls([p], regularizer=reg, lam=LAM, fused=True, **options)
    for g in gradients((37, 53), 3):
        version, loss = p._version, (p * p).sum()
        p.grad = g
        optimizer.step()
        assert p._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        (p * p).sum().backward()  # a new graph is fine
    version = p._version
    optimizer.param_groups[0]["lam"] = 0.5 * LAM
    optimizer.refresh()
    assert p._version > version or kind.startswith("prox")


# ---------------------------------------------------------------------- compiled once


@pytest.mark.parametrize("name", ["l1", "group-rows", "sparse-columns"])
@pytest.mark.parametrize("kind", ["linbreg", "linbreg-paper", "adabreg", "proxsgd"])
def test_numbers_and_shapes_compile_nothing(kind: str, name: str) -> None:
    import numba

    from torch_bregman.kernels import groups, step

    loops = [step.step, groups.squares, groups.shrink, groups.look]
    with event.install_recorder("numba:compile") as seen, event.install_recorder("numba:run_pass") as passes:
        numba.cfunc("void(voidptr)")(lambda data: None)
        assert seen.buffer or passes.buffer, "the recorder hears nothing"
    pair = twins(kind, name)
    walk(pair.fused, pair.params[1], 2)
    pair.edit(EDITS["mul"])
    walk(pair.fused, pair.params[1], 2)
    made = [loop.cache_info().misses for loop in loops]
    group = pair.fused.param_groups[0]
    with event.install_recorder("numba:compile") as seen, event.install_recorder("numba:run_pass") as passes:
        changes: list[dict[str, Any]] = [{"lr": 0.003}, {"lr": torch.tensor(0.01)}, {"lam": 0.05}, {"lam": 1}]
        changes += [{"weight_decay": 0.01}, {"weight_decay": 0.5}, {"maximize": True}]
        changes += [] if kind == "proxsgd" else [{"delta": 0.3}, {"delta": 2}]
        changes += [{"betas": (0.5, 0.7)}, {"eps": 1e-3}] if kind.startswith("adabreg") else []
        changes += [{"momentum": 0.5}] if kind == "linbreg-paper" else []
        for change in changes:
            group.update(change)
            walk(pair.fused, pair.params[1], 1)
        reg = REGULARISERS[name]()
        for shape in ((17, 23), (300, 1000), (1, 1), (3, 50)):
            params = [nn.Parameter(torch.zeros(shape))]
            cls, options = OPTIMIZERS[kind]
            walk(cls(params, regularizer=reg, lam=LAM, fused=True, **options), params, 2)
    assert not seen.buffer
    assert not passes.buffer
    assert [loop.cache_info().misses for loop in loops] == made


# ---------------------------------------------------------------------- the choice


def tensor_list(*shapes: Shape) -> list[nn.Parameter]:
    return [nn.Parameter(start(None, shape, seed=i)) for i, shape in enumerate(shapes)]


def test_readable_at_first(ran: list[Any]) -> None:
    mine, theirs = tensor_list((37, 53), (9,)), tensor_list((37, 53), (9,))
    a = tb.LinBreg(mine, lr=0.1, momentum=0.9, momentum_rule="sgd")
    b = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    walk(a, mine)
    walk(b, theirs)
    for p, q in zip(mine, theirs, strict=True):
        same(p, q)
    assert a.param_groups[0]["entries_updated"] == 4 * (37 * 53 + 9)
    assert a.param_groups[0]["fused"] is None
    assert not ran


@pytest.mark.parametrize("kind", ["linbreg", "adabreg", "proxsgd"])
def test_fused_once_it_pays(kind: str, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "EARNED", 5 * 200)
    cls, options = OPTIMIZERS[kind]
    params = tensor_list((10, 18), (20,))
    optimizer = cls(params, regularizer=tb.L1(), lam=LAM, **options)
    when = []
    for k in range(8):
        walk(optimizer, params, 1, seed=k)
        when.append(len(ran))
    assert when == [0, 0, 0, 0, 0, 1, 2, 3]
    assert optimizer.param_groups[0]["entries_updated"] >= 1000


@pytest.mark.parametrize("way", [copy.deepcopy, through_disk], ids=["deepcopy", "disk"])
def test_a_resumed_run_switches_at_the_same_step(way: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "EARNED", 5 * 200)
    params = tensor_list((10, 20))
    optimizer = tb.AdaBreg(params, regularizer=tb.L1(), lam=LAM)
    walk(optimizer, params, 3)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = tb.AdaBreg(copies, regularizer=tb.L1(), lam=LAM)
    other.load_state_dict(way(optimizer.state_dict()))
    for o, ps in ((optimizer, params), (other, copies)):
        when = []
        for k in range(5):
            ran.clear()
            walk(o, ps, 1, seed=k)
            when.append(len(ran))
        assert when == [0, 0, 1, 1, 1]
    assert_same_run(optimizer, other)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}], ids=str)
def test_who_decides_is_not_overruled(options: Any, ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "EARNED", 0)
    params = tensor_list((10, 20))
    walk(tb.LinBreg(params, regularizer=tb.L1(), lam=LAM, **options), params)
    assert not ran
    params = tensor_list((10, 20))
    walk(tb.LinBreg(params, regularizer=tb.L1(), lam=LAM), params)
    assert ran


def test_without_numba(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    monkeypatch.setattr(plans, "EARNED", 0)
    params = tensor_list((10, 20))
    optimizer = tb.LinBreg(params, regularizer=tb.L1(), lam=LAM)
    walk(optimizer, params)
    assert not ran
    for cls in (tb.LinBreg, tb.AdaBreg, tb.ProxSGD):
        with pytest.raises(ImportError, match="fast"):
            cls(tensor_list((10, 20)), fused=True)
    with pytest.raises(ImportError, match="fast"):
        optimizer.add_param_group({"params": tensor_list((3, 3)), "fused": True})
    assert len(optimizer.param_groups) == len(optimizer.regularizers) == 1
    walk(optimizer, params)
    optimizer.add_param_group({"params": tensor_list((3, 3))})
    assert len(optimizer.param_groups) == len(optimizer.regularizers) == 2


@pytest.mark.parametrize("cls", [tb.LinBreg, tb.AdaBreg, tb.ProxSGD])
def test_fused_and_foreach_together_are_refused(cls: type) -> None:
    with pytest.raises(ValueError, match="fused"):
        cls(tensor_list((3, 3)), fused=True, foreach=True)
    optimizer = cls(tensor_list((3, 3)))
    with pytest.raises(ValueError, match="fused"):
        optimizer.add_param_group({"params": tensor_list((3, 3)), "fused": True, "foreach": True})
    assert len(optimizer.param_groups) == 1


# ---------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in ("linbreg-paper", "adabreg", "proxsgd") for name in ("none", "l1")]
    + [("adabreg", "nonnegative"), ("adabreg", "group-columns"), ("adabreg", "group-channels")]
    + [("linbreg", name) for name in GROUPED if "unweighted" not in name],
)
def test_threads_do_not_change_a_bit(kind: str, name: str, threads: Callable[[int], None]) -> None:
    linear = name in ENTRYWISE or "rows" in name or "columns" in name
    shapes = [(600, 700), (50, 40)] if linear else [(64, 40, 3, 3)] * 2 + [(128, 100, 3, 3)]
    reg = REGULARISERS[name]()
    cls, options = OPTIMIZERS[kind]
    runs = []
    for count in (1, 2):
        threads(count)
        params = [nn.Parameter(start(reg, shape, seed=i)) for i, shape in enumerate(shapes)]
        optimizer = cls(params, regularizer=reg, lam=LAM, fused=True, **options)
        walk(optimizer, params, 2)
        with torch.no_grad():
            params[0].mul_(0.5)
        walk(optimizer, params, 1, seed=2)
        runs.append(optimizer)
    assert_same_run(runs[0], runs[1])


# ---------------------------------------------------------------------- numbers that are none, and tiny ones


@every_optimizer
@pytest.mark.parametrize("large", [False, True])
def test_a_nan_in_the_gradient_spoils_one_weight(kind: str, large: bool) -> None:
    shape = (300, 1000) if large else (37, 53)
    pair = Twins(kind, [start(tb.L1(), shape)], tb.L1())
    pair.walk(3)
    g = gradients(shape, 1, seed=5)[0].clone()
    g[20, 31] = float("nan")
    pair.step([g])
    for params in pair.params:
        assert params[0].isnan().nonzero().tolist() == [[20, 31]]
    pair.walk(3)
    for params in pair.params:
        assert params[0].isnan().nonzero().tolist() == [[20, 31]]
    pair.check()


@pairwise({"kind": list(OPTIMIZERS), "name": list(ENTRYWISE), "value": [float("inf"), float("-inf"), float("nan")]})
def test_an_infinite_gradient(kind: str, name: str, value: float) -> None:
    pair = twins(kind, name)
    pair.walk(3)
    each = [gradients(tuple(p.shape), 1, seed=5)[0].clone() for p in pair.params[0]]
    each[0][20, 31] = value
    pair.step(each)
    pair.check()
    assert not pair.params[1][0][20, 31].isfinite() or name == "nonnegative"
    pair.walk(2)
    pair.check()


@pairwise(
    {
        "kind": ["linbreg", "adabreg"],
        "name": [name for name in GROUPED if "unweighted" not in name],
        "value": [float("inf"), float("nan")],
    }
)
def test_an_infinite_gradient_stays_in_its_group(kind: str, name: str, value: float) -> None:
    pair = twins(kind, name)
    pair.walk(3)
    each = [gradients(tuple(p.shape), 1, seed=5)[0].clone() for p in pair.params[0]]
    each[0][3, 2] = value
    pair.step(each)
    pair.check()
    pair.walk(2)
    pair.check()


@every_dual
def test_tiny_gradients(kind: str) -> None:
    pair = twins(kind, "l1")
    pair.walk(2)
    for size in (1e-42, 1e-20, 0.0):
        for _ in range(3):
            pair.step([torch.full_like(p, size) for p in pair.params[0]])
    pair.check()
    fresh = twins(kind, "l1", large=True)
    before = [p.detach().clone() for p in fresh.params[1]]
    for _ in range(5):
        fresh.step([torch.full_like(p, 1e-42) for p in fresh.params[0]])
    fresh.check()
    for p, w in zip(fresh.params[1], before, strict=True):
        assert torch.equal(p != 0, w != 0)
        for value in fresh.fused.state[p].values():
            assert bool(torch.as_tensor(value).isfinite().all())
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in fresh.fused.state[p]:
                assert bool((fresh.fused.state[p][moment].abs() <= 1e-41).all())


@pytest.mark.parametrize("name", ["l1", "group-rows", "group-columns"])
def test_torch_still_knows_tiny_numbers_after_a_step(name: str, threads: Callable[[int], None]) -> None:
    threads(2)
    tiny = torch.full((1 << 20,), 1e-40)
    assert bool(((tiny * 1.0) != 0).all())
    pair = Twins("adabreg", [start(REGULARISERS[name](), (300, 1000))], REGULARISERS[name]())
    walk(pair.fused, pair.params[1], 3)
    pair.edit(EDITS["data-mul"])
    walk(pair.fused, pair.params[1], 1)
    assert (torch.tensor([1e-40]) * 1.0).item() != 0
    assert bool(((tiny * 1.0) != 0).all()), "another thread was left with its zeros"


# ---------------------------------------------------------------------- memory


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that torch and Python (NumPy included) asked for while `function` ran."""
    tracemalloc.start()
    try:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            tracemalloc.reset_peak()
            base = tracemalloc.get_traced_memory()[0]
            function()
            python = tracemalloc.get_traced_memory()[1] - base
    finally:
        tracemalloc.stop()
    return python + sum(max(each.self_cpu_memory_usage, 0) for each in profile.events())


@pytest.mark.parametrize(
    ("kind", "count"), [("linbreg", 1), ("linbreg-paper", 2), ("linbreg-sgd", 2), ("adabreg", 3), ("proxsgd", 0)]
)
def test_a_step_needs_no_memory(kind: str, count: int) -> None:
    w = torch.zeros(1000, 2000)
    w[:300] = 0.1
    cls, options = OPTIMIZERS[kind]
    usage = {}
    for more in ("fused", "foreach"):
        p = nn.Parameter(w.clone())
        optimizer = cls([p], regularizer=tb.L1(), lam=LAM, **options, **{more: True})
        p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        usage[more] = allocated(optimizer.step)
        state = [value for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.numel() > 1]
        assert len(state) == count
        assert all(value.shape == p.shape for value in state)
    size = w.numel() * w.element_size()
    assert usage["foreach"] > size, "the measurement sees nothing"
    assert usage["fused"] < 0.05 * size


@pytest.mark.parametrize("name", ["group-rows", "group-columns", "group-filters", "group-channels", "group-kernels"])
def test_groups_need_no_memory(name: str) -> None:
    shape = (1000, 2000) if name in ("group-rows", "group-columns") else (512, 256, 4, 4)
    reg = REGULARISERS[name]()
    p = nn.Parameter(start(reg, shape))
    optimizer = tb.LinBreg([p], regularizer=reg, lam=LAM, fused=True)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.step()
    spare = 0.05 if name != "group-kernels" else 0.4  # there is a group for every 16 entries
    assert allocated(optimizer.step) < spare * p.numel() * p.element_size()


# ---------------------------------------------------------------------- refresh


@pytest.mark.parametrize("name", list(REGULARISERS))
@pytest.mark.parametrize("kind", ["linbreg", "adabreg", "proxsgd"])
def test_refresh(kind: str, name: str, ran: list[Any]) -> None:
    pair = twins(kind, name, large=name not in ("group-index", "nuclear"))
    for optimizer in pair.both:
        optimizer.refresh()  # nothing there yet, nothing done
    pair.walk(5)
    exact = (1e-4, 1e-5) if name == "nuclear" else None
    before = [p.detach().clone() for p in pair.params[1]]
    for lam in (0.5 * LAM, 2 * LAM):
        pair.set(lam=lam, **({} if kind == "proxsgd" else {"delta": 0.8}))
        ran.clear()
        for optimizer in pair.both:
            optimizer.refresh()
        pair.check(exact)
        if kind == "proxsgd":
            assert not ran
        elif name in ENTRYWISE:
            assert ran == [("HOLD", "BOTH")]
    if kind != "proxsgd":
        assert any(not torch.equal(p, w) for p, w in zip(pair.params[1], before, strict=True))
    pair.walk(3, seed=2)
    pair.check(exact)


@pytest.mark.parametrize("edit", ["mul", "data-mul", "wake"])
@pytest.mark.parametrize("name", ["l1", "group-rows", "sparse-channels"])
def test_refresh_after_an_edit(name: str, edit: str) -> None:
    pair = twins("linbreg", name, large=True)
    pair.walk(5)
    pair.edit(EDITS[edit])
    pair.set(lam=0.5 * LAM)
    for optimizer in pair.both:
        optimizer.refresh()
    pair.check()


def test_refresh_of_some_groups() -> None:
    params = tensor_list((10, 20), (10, 20))
    optimizer = tb.LinBreg([{"params": [p]} for p in params], regularizer=tb.L1(), lam=LAM, fused=True)
    walk(optimizer, params)
    before = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["lam"] = 2 * LAM
    optimizer.refresh([1])
    same(params[0], before[0])
    assert int((params[1] != 0).sum()) < int((before[1] != 0).sum())


@pytest.mark.parametrize("name", ["l1", "group-rows"])
def test_refresh_of_a_parameter_that_had_no_gradient(name: str) -> None:
    pair = twins("linbreg", name)
    pair.walk(3)
    pair.step([None, *[gradients(tuple(p.shape), 1)[0] for p in pair.params[0][1:]]])
    pair.set(lam=0.5 * LAM)
    for optimizer in pair.both:
        optimizer.refresh()
    pair.check()
    pair.walk(3, seed=3)
    pair.check()
