"""The properties of the method, for every optimizer and every regulariser."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cases import FLOATS, PATHS, ElasticNet, labels, pairwise, same, through_disk, with_rates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_bregman as tb

Array = np.ndarray
quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


# ---------------------------------------------------------------------- the tables: regularisers


def np_soft(x: Array, t: float) -> Array:
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def np_group_prox(x: Array, t: float, labels: Array) -> Array:
    out = x.copy()
    for label in np.unique(labels):
        inside = labels == label
        norm = np.sqrt(np.sum(x[inside] ** 2))
        out[inside] = 0 if norm == 0 else x[inside] * max(1 - t * np.sqrt(inside.sum()) / norm, 0)
    return out


def np_group_subgradient(x: Array, labels: Array) -> Array:
    out = np.zeros_like(x)
    for label in np.unique(labels):
        inside = labels == label
        norm = np.sqrt(np.sum(x[inside] ** 2))
        if norm > 0:
            out[inside] = np.sqrt(inside.sum()) * x[inside] / norm
    return out


def np_nuclear_prox(x: Array, t: float) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    return u @ np.diag(np.maximum(s - t, 0)) @ vh


def np_nuclear_subgradient(x: Array) -> Array:
    u, s, vh = np.linalg.svd(x, full_matrices=False)
    rank = int((s > 1e-9).sum())
    return u[:, :rank] @ vh[:rank]


INDEX = torch.tensor(
    [[0, 1, 1, 3, 0], [2, 2, 1, 3, 3], [0, 4, 4, 4, 2], [5, 5, 0, 1, 2], [6, 6, 6, 6, 6], [3, 4, 5, 0, 0]]
)


@dataclass(frozen=True)
class Case:
    """A regulariser with a weight shape, its start, and its formulas in NumPy."""

    name: str
    make: Callable[[], tb.Regularizer | None]
    shape: tuple[int, ...]
    np_prox: Callable[[Array, float], Array]  # prox_{tJ₁}(x)
    np_subgradient: Callable[[Array], Array]
    labels: Array | None = None
    homogeneous: bool = True
    entrywise: bool = False

    def start(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
        """A sparse weight: about a third of the entries or groups; low rank for the nuclear norm."""
        rng = np.random.default_rng(seed)
        w = rng.normal(size=self.shape)
        w = np.sign(w) * (np.abs(w) + 0.1)  # no weight is so small that float32 loses it beside λ
        if self.name == "nuclear":
            w = np.outer(w[:, 0] * (np.arange(6) % 2), w[0] * (np.arange(5) < 4))
        elif self.labels is not None:
            count = int(self.labels.max()) + 1
            alive = rng.permutation(count) < max(1, round(count / 3))
            w = w * alive[self.labels]
            if self.name.startswith("sparse"):
                w = w * (rng.random(self.shape) < 0.7)
        else:
            w = w * (rng.random(self.shape) < 0.35)
        if self.name == "nonnegative":
            w = np.abs(w)
        return torch.tensor(w, dtype=dtype)


def grouped(name: str, shape: tuple[int, ...]) -> Case:
    groups: Any = INDEX if name == "index" else name
    which = INDEX.numpy() if name == "index" else labels(name, shape)
    return Case(
        f"group-{name}",
        lambda: tb.GroupL1(groups),
        shape,
        lambda x, t: np_group_prox(x, t, which),
        lambda x: np_group_subgradient(x, which),
        which,
    )


def sparse_grouped(name: str, shape: tuple[int, ...], a: float) -> Case:
    which = labels(name, shape)
    return Case(
        f"sparse-group-{name}",
        lambda: tb.SparseGroupL1(name, l1_ratio=a),
        shape,
        lambda x, t: np_group_prox(np_soft(x, a * t), (1 - a) * t, which),
        lambda x: a * np.sign(x) + (1 - a) * np_group_subgradient(x, which),
        which,
    )


LINEAR, CONV = (6, 5), (4, 3, 2, 2)
REGULARISERS = [
    Case("l1", tb.L1, LINEAR, np_soft, np.sign, entrywise=True),
    Case(
        "nonnegative",
        tb.NonNegativeL1,
        LINEAR,
        lambda x, t: np.maximum(x - t, 0),
        lambda x: 1.0 * (x > 0),
        None,
        True,
        True,
    ),
    grouped("rows", LINEAR),
    grouped("columns", LINEAR),
    grouped("index", LINEAR),
    grouped("kernels", CONV),
    grouped("filters", CONV),
    grouped("channels", CONV),
    sparse_grouped("rows", LINEAR, 0.3),
    sparse_grouped("kernels", CONV, 0.5),
    Case("nuclear", tb.NuclearNorm, LINEAR, np_nuclear_prox, np_nuclear_subgradient),
    Case(
        "elastic-net",
        ElasticNet,
        LINEAR,
        lambda x, t: np_soft(x, t) / (1 + 0.5 * t),
        lambda x: np.sign(x) + 0.5 * x,
        homogeneous=False,
        entrywise=True,
    ),
]
NOTHING = Case("none", lambda: None, LINEAR, lambda x, t: x, np.zeros_like)


def those(*, nuclear: bool = True, elastic: bool = True, none: bool = False) -> list[Case]:
    chosen = [c for c in REGULARISERS if (nuclear or c.name != "nuclear") and (elastic or c.name != "elastic-net")]
    return chosen + ([NOTHING] if none else [])


def cases(**which: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", those(**which), ids=lambda case: case.name)


# ---------------------------------------------------------------------- the tables: optimizers

OPTIMIZERS = with_rates(
    {
        "linbreg": 0.1,
        "linbreg-paper": 0.1,
        "linbreg-sgd": 0.02,
        "linbreg-nesterov": 0.02,
        "adabreg": 0.05,
        "adabreg-decoupled": 0.05,
        "proxsgd": 0.1,
        "proxsgd-momentum": 0.02,
    }
)
DUAL = [kind for kind in OPTIMIZERS if not kind.startswith("prox")]
every_optimizer = pytest.mark.parametrize("kind", list(OPTIMIZERS))
every_dual = pytest.mark.parametrize("kind", DUAL)
either_path = pytest.mark.parametrize("foreach", PATHS.values(), ids=list(PATHS))
LAM = 1.0


def build(kind: str, params: Any, case: Case, **changes: Any) -> Any:
    cls, options = OPTIMIZERS[kind]
    return cls(params, **{**options, "regularizer": case.make(), "lam": LAM, **changes})


def weight_of(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(case.start(seed, dtype))


def random_gradients(p: Tensor, count: int, seed: int = 1, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(p.shape, generator=generator, dtype=torch.float64)  # so that the dual goes somewhere
    noise = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(scale * (drift + n)).to(p.dtype) for n in noise]


def walk(optimizer: Any, p: Tensor, gradients: list[Tensor]) -> None:
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()


def noop_step(optimizer: Any) -> None:
    """A step that must not move anything: zero gradients, lr 0, the paper's momentum (which holds τ) emptied."""
    kept = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
            if group.get("momentum_rule") == "paper" and "momentum" in optimizer.state[p]:
                optimizer.state[p]["momentum"].zero_()
    optimizer.step()
    for group, lr in zip(optimizer.param_groups, kept, strict=True):
        group["lr"] = lr


def close(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(a.detach(), b.detach().to(a.dtype), rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------- the equations


def reference(kind: str, theta: Array, gradients: list[Array], case: Case, lam: float, delta: float) -> list[Array]:
    """method.md, section 2, in NumPy and float64: every iterate θ."""
    options = OPTIMIZERS[kind][1]
    lr, beta = options["lr"], options.get("momentum", 0.0)
    v = theta / delta + lam * case.np_subgradient(theta)
    m = second = np.zeros_like(theta)
    path = []
    for k, g in enumerate(gradients, start=1):
        if kind == "linbreg":
            v = v - lr * g
        elif kind == "linbreg-paper":
            m = beta * m + (1 - beta) * lr * g
            v = v - m
        elif kind == "linbreg-sgd":
            m = beta * m + g
            v = v - lr * m
        elif kind == "linbreg-nesterov":
            m = beta * m + g
            v = v - lr * (g + beta * m)
        elif kind.startswith("adabreg"):
            before = case.np_prox(delta * v, delta * lam)
            v = v - lr * options.get("weight_decay", 0.0) * before
            m = 0.9 * m + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            v = v - lr * (m / (1 - 0.9**k)) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        else:
            m = beta * m + g
            theta = case.np_prox(theta - lr * m, lr * lam)
            path.append(theta)
            continue
        path.append(case.np_prox(delta * v, delta * lam))
    return path


@pairwise({"case": those(none=True), "kind": list(OPTIMIZERS), "foreach": PATHS})
def test_follows_the_equations(case: Case, kind: str, foreach: bool) -> None:
    delta = 1.0 if kind.startswith("prox") else 0.7
    p = weight_of(case)
    gradients = random_gradients(p, 50)
    path = reference(kind, p.detach().numpy().copy(), [g.numpy() for g in gradients], case, LAM, delta)
    optimizer = build(kind, [p], case, foreach=foreach, **({} if delta == 1 else {"delta": delta}))
    for g, expected in zip(gradients, path, strict=True):
        walk(optimizer, p, [g])
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
        if case.name not in ("nuclear", "none"):
            np.testing.assert_array_equal(p.detach().numpy() != 0, expected != 0)
    assert np.abs(path[-1] - path[0]).max() > 0.1, "the run went nowhere, so it tests nothing"


@either_path
def test_decoupled_decay_takes_the_same_share_of_every_weight(foreach: bool) -> None:
    """Whatever its gradients were; coupled, it moves weights of small gradients more. Zeros stay what they are."""
    p = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    options = {"regularizer": tb.L1(), "lam": 0.5, "lr": 0.1, "weight_decay": 0.2, "decoupled_weight_decay": True}
    optimizer = tb.AdaBreg([p], betas=(0.0, 0.999), foreach=foreach, **options)
    for grad in ([1.0, 1e-3, 1e-2, 0.0], [0.0] * 4):
        p.grad, before = torch.tensor(grad, dtype=torch.float64), p.detach().clone()
        optimizer.step()
    close(before - p, 0.1 * 0.2 * before, 1e-12)
    assert (before[:2] > 0).all()
    assert optimizer.state[p]["dual"][2] == pytest.approx(-0.1, rel=1e-5)


def test_option_delta_is_not_one_for_proxsgd() -> None:
    """ProxSGD has no δ; the table above relies on that."""
    with pytest.raises(TypeError, match="delta"):
        tb.ProxSGD([nn.Parameter(torch.zeros(2))], delta=0.5)


@pairwise({"case": those(none=True), "kind": DUAL, "delta": [0.3, 1.0], "dtype": FLOATS})
def test_start_is_a_fixed_point(case: Case, kind: str, delta: float, dtype: torch.dtype) -> None:
    p = weight_of(case, dtype)
    before = p.detach().clone()
    optimizer = build(kind, [p], case, delta=delta, weight_decay=0.0)
    walk(optimizer, p, [torch.zeros_like(p)])
    tolerance = 2e-6 if dtype == torch.float32 else 1e-14
    close(p, before, tolerance)
    if case.name != "nuclear":
        assert torch.equal(p != 0, before != 0)
    once = p.detach().clone()
    walk(optimizer, p, [torch.zeros_like(p)] * 5)
    close(p, once, tolerance / 10)


@quick
@given(
    seed=st.integers(0, 10**6),
    lam=st.floats(0, 10),
    delta=st.floats(1 / 16, 16),
    case=st.sampled_from([c for c in REGULARISERS if c.name != "nuclear"]),
)
def test_start_is_a_fixed_point_for_any_strength(seed: int, lam: float, delta: float, case: Case) -> None:
    p = weight_of(case, seed=seed)
    before = p.detach().clone()
    optimizer = tb.LinBreg([p], regularizer=case.make(), lam=lam, delta=delta)
    walk(optimizer, p, [torch.zeros_like(p)])
    close(p, before, 1e-12)
    assert torch.equal(p != 0, before != 0)


@pairwise({"case": those(elastic=False), "kind": DUAL, "delta": [0.25, 4.0, 0.3]})
def test_delta_scales_the_weights_and_keeps_the_support(case: Case, kind: str, delta: float) -> None:
    one = weight_of(case)
    scaled = nn.Parameter(one.detach() * delta)  # the same v = θ/δ + p
    gradients = random_gradients(one, 20)
    a = build(kind, [one], case, weight_decay=0.0)  # which takes more of weights that are larger
    b = build(kind, [scaled], case, delta=delta, weight_decay=0.0)
    for g in gradients:
        walk(a, one, [g])
        walk(b, scaled, [g])
        close(scaled, one * delta, 1e-12)
        if case.name != "nuclear":
            assert torch.equal(scaled != 0, one != 0)


@quick
@given(seed=st.integers(0, 10**6), lam=st.floats(0.01, 2), lr=st.floats(0.001, 1), delta=st.floats(0.1, 3))
def test_l1_support_changes_only_near_the_threshold(seed: int, lam: float, lr: float, delta: float) -> None:
    case = REGULARISERS[0]
    p = weight_of(case, seed=seed)
    optimizer = tb.LinBreg([p], lr=lr, regularizer=tb.L1(), lam=lam, delta=delta)
    for g in random_gradients(p, 8, seed):
        walk(optimizer, p, [torch.zeros_like(p)])  # so that there is a dual to look at
        v, theta = optimizer.state[p]["dual"].clone(), p.detach().clone()
        assert torch.equal(theta != 0, v.abs() > lam)
        walk(optimizer, p, [g])
        flipped = (theta != 0) != (p != 0)
        near = (v.abs() - lam).abs() <= lr * g.abs() * (1 + 1e-12)
        assert not bool((flipped & ~near).any())
        # On the support, with constant sign, there is no shrinkage: Δθ = −δτg.
        stays = (theta != 0) & (p.detach().sign() == theta.sign())
        close((p - theta)[stays], (-delta * lr * g)[stays], 1e-12)


def test_proxsgd_shrinks_the_support_where_linbreg_does_not() -> None:
    start = torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    moved = {}
    for cls in (tb.LinBreg, tb.ProxSGD):
        p = nn.Parameter(start.clone())
        walk(cls([p], lr=0.125, regularizer=tb.L1(), lam=0.5), p, [torch.zeros_like(p)] * 3)
        moved[cls] = p.detach() - start
    same(moved[tb.LinBreg], torch.zeros_like(start))
    same(moved[tb.ProxSGD], torch.tensor([-0.1875, 0.1875, 0, 0], dtype=torch.float64))


# ---------------------------------------------------------------------- storage and precision


@pairwise({"case": those(none=True), "kind": list(OPTIMIZERS), "foreach": PATHS})
def test_weights_keep_their_storage(case: Case, kind: str, foreach: bool) -> None:
    p = weight_of(case, torch.float32)
    pointer, version = p.data_ptr(), p.detach().clone()
    walk(build(kind, [p], case, foreach=foreach), p, random_gradients(p, 5))
    assert p.data_ptr() == pointer
    assert not torch.equal(p, version)


LOW = [torch.bfloat16, torch.float16]


def floats(optimizer: Any) -> dict[str, torch.dtype]:
    """The dtypes of all state tensors, with the dual in them."""
    return {
        f"{i}.{name}": value.dtype
        for i, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


@pairwise({"case": those(nuclear=False, none=True), "kind": list(OPTIMIZERS), "dtype": LOW})
def test_low_precision_weights_have_float32_state(case: Case, kind: str, dtype: torch.dtype) -> None:
    p = weight_of(case, dtype)
    optimizer = build(kind, [p], case)
    walk(optimizer, p, random_gradients(p, 3))
    assert p.dtype == dtype
    if kind != "proxsgd":
        assert optimizer.state[p]
    if kind in DUAL:
        assert optimizer.state[p]["dual"].dtype == torch.float32
    q = nn.Parameter(p.detach().clone())
    loaded = build(kind, [q], case)
    loaded.load_state_dict(through_disk(optimizer.state_dict()))
    for other in (optimizer, loaded, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert set(floats(other).values()) <= {torch.float32}, floats(other)
        for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
            for name, value in mine.items():
                assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]


def test_dual_of_a_scalar_parameter_stays_float32_after_loading() -> None:
    """A learnable scale has no dimensions, as counters have, but its dual is no counter."""
    p = nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))
    optimizer = tb.LinBreg([p], lr=1e-3)
    walk(optimizer, p, [torch.ones_like(p)] * 3)
    q = nn.Parameter(p.detach().clone())
    loaded = tb.LinBreg([q], lr=1e-3)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state[q]["dual"].dtype == torch.float32
    same(loaded.state[q]["dual"], optimizer.state[p]["dual"])


def test_strength_as_scalar_tensor_survives_loading_in_bfloat16() -> None:
    lam = torch.tensor(0.3)  # not a bfloat16 number
    p = weight_of(REGULARISERS[0], torch.bfloat16)
    optimizer = tb.LinBreg([p], regularizer=tb.L1(), lam=lam)
    walk(optimizer, p, random_gradients(p, 5))
    q = nn.Parameter(p.detach().clone())
    loaded = tb.LinBreg([q], regularizer=tb.L1(), lam=lam)
    loaded.load_state_dict(optimizer.state_dict())
    for seed in range(3):
        walk(optimizer, p, random_gradients(p, 1, seed))
        walk(loaded, q, random_gradients(p, 1, seed))
        same(loaded.state[q]["dual"], optimizer.state[p]["dual"])
        same(q, p)


@pairwise({"case": those(nuclear=False), "kind": DUAL, "dtype": LOW})
def test_noop_steps_keep_the_support_in_low_precision(case: Case, kind: str, dtype: torch.dtype) -> None:
    p = weight_of(case, dtype)
    optimizer = build(kind, [p], case)
    walk(optimizer, p, random_gradients(p, 8))
    weight = p.detach().clone()
    support = weight != 0
    assert 0 < int(support.sum()) < p.numel()
    for _ in range(20):
        noop_step(optimizer)
        assert torch.equal(p != 0, support)
    same(p, weight)


# ---------------------------------------------------------------------- options that change on the way


@every_dual
@cases()
def test_a_new_lam_is_obeyed_by_the_next_step(case: Case, kind: str) -> None:
    p = weight_of(case)
    optimizer = build(kind, [p], case)
    walk(optimizer, p, random_gradients(p, 10))
    v = optimizer.state[p]["dual"].clone()
    for lam in (2 * LAM, 0.1 * LAM, 0.0, LAM):
        optimizer.param_groups[0]["lam"] = lam
        noop_step(optimizer)
        same(optimizer.state[p]["dual"], v)  # it remembers all of it
        np.testing.assert_allclose(p.detach().numpy(), case.np_prox(v.numpy(), lam), rtol=1e-12, atol=1e-12)


@every_dual
def test_a_lam_tensor_changed_in_place_is_a_new_lam(kind: str) -> None:
    case, lam = REGULARISERS[0], torch.full(LINEAR, LAM, dtype=torch.float64)
    p = weight_of(case)
    optimizer = build(kind, [p], case, lam=lam)
    walk(optimizer, p, random_gradients(p, 10))
    v = optimizer.state[p]["dual"].clone()
    optimizer.param_groups[0]["lam"].mul_(0.5)
    noop_step(optimizer)
    same(optimizer.state[p]["dual"], v)
    np.testing.assert_allclose(p.detach().numpy(), np_soft(v.numpy(), 0.5 * LAM), rtol=1e-12, atol=1e-12)


@cases()
def test_a_new_delta_is_obeyed_by_the_next_step(case: Case) -> None:
    p = weight_of(case)
    optimizer = build("linbreg", [p], case)
    walk(optimizer, p, random_gradients(p, 10))
    v = optimizer.state[p]["dual"].clone()
    optimizer.param_groups[0]["delta"] = 0.3
    noop_step(optimizer)
    same(optimizer.state[p]["dual"], v)
    np.testing.assert_allclose(p.detach().numpy(), case.np_prox(0.3 * v.numpy(), 0.3 * LAM), rtol=1e-12, atol=1e-12)


@every_optimizer
def test_a_new_lr_is_obeyed_by_the_next_step(kind: str) -> None:
    case = NOTHING
    p = weight_of(case)
    optimizer = build(kind, [p], case)
    walk(optimizer, p, random_gradients(p, 3))
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    if "paper" in kind:  # τ is inside the buffer: only what comes now is scaled
        for o, w in ((optimizer, p), (twin, q)):
            o.state[w]["momentum"].zero_()
    before = p.detach().clone()
    twin.param_groups[0]["lr"] *= 0.5
    g = random_gradients(p, 1, seed=5)
    walk(optimizer, p, g)
    walk(twin, q, g)
    close(q - before, 0.5 * (p - before), 1e-12)
    assert not torch.equal(p, before)


@every_optimizer
def test_lam_per_entry(kind: str) -> None:
    case = REGULARISERS[0]
    strengths = torch.tensor([0.05, 0.4, 1.0], dtype=torch.float64)
    lam = strengths[torch.arange(30).reshape(LINEAR) % 3]
    p = weight_of(case)
    gradients = random_gradients(p, 20)
    optimizer = build(kind, [p], case, lam=lam)
    alone = [weight_of(case) for _ in strengths]
    walk(optimizer, p, gradients)
    for value, q in zip(strengths.tolist(), alone, strict=True):
        walk(build(kind, [q], case, lam=value), q, gradients)
        close(p[lam == value], q[lam == value], 1e-12)
        assert torch.equal(p[lam == value] != 0, q[lam == value] != 0)
    assert not torch.equal(alone[0], alone[2])


@every_optimizer
@pytest.mark.parametrize("case", [c for c in REGULARISERS if c.name in ("l1", "group-rows", "sparse-group-rows")])
def test_lam_per_row(case: Case, kind: str) -> None:
    lam = torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8, 1.0], dtype=torch.float64).unsqueeze(1)
    p = weight_of(case)
    gradients = random_gradients(p, 20)
    walk(build(kind, [p], case, lam=lam), p, gradients)
    for row, value in enumerate(lam.flatten().tolist()):
        q = weight_of(case)
        walk(build(kind, [q], case, lam=value), q, gradients)
        close(p[row], q[row], 1e-12)


@either_path
@every_optimizer
def test_groups_have_their_own_options(kind: str, foreach: bool) -> None:
    chosen = [c for c in REGULARISERS if c.name in ("l1", "group-kernels", "nonnegative", "nuclear")] + [NOTHING]
    together, alone = [weight_of(c) for c in chosen], [weight_of(c) for c in chosen]
    options = [{"lam": 0.1 * (i + 1), "lr": 0.01 * (i + 1)} for i in range(len(chosen))]
    if kind in DUAL:
        options = [{**o, "delta": 0.5 + i} for i, o in enumerate(options)]
    groups = [{"params": [p], "regularizer": c.make(), **o} for p, c, o in zip(together, chosen, options, strict=True)]
    joint = build(kind, groups, NOTHING, foreach=foreach)
    single = [build(kind, [p], c, foreach=foreach, **o) for p, c, o in zip(alone, chosen, options, strict=True)]
    gradients = [random_gradients(p, 10) for p in together]
    for k in range(10):
        for p, q, g, o in zip(together, alone, gradients, single, strict=True):
            p.grad = g[k].clone()
            walk(o, q, [g[k]])
        joint.step()
    for p, q in zip(together, alone, strict=True):
        same(p, q)


@every_optimizer
def test_a_group_added_after_training_began(kind: str) -> None:
    first, second = REGULARISERS[0], next(c for c in REGULARISERS if c.name == "group-filters")
    p, q, alone_p, alone_q = weight_of(first), weight_of(second), weight_of(first), weight_of(second)
    optimizer = build(kind, [p], first)
    gp, gq = random_gradients(p, 10), random_gradients(q, 5)
    walk(optimizer, p, gp[:5])
    optimizer.add_param_group({"params": [q], "regularizer": second.make(), "lam": 0.2})
    for a, b in zip(gp[5:], gq, strict=True):
        q.grad = b.clone()
        walk(optimizer, p, [a])
    walk(build(kind, [alone_p], first), alone_p, gp)
    walk(build(kind, [alone_q], second, lam=0.2), alone_q, gq)
    same(p, alone_p)
    same(q, alone_q)
    assert [g["regularizer"] for g in optimizer.param_groups] == ["L1()", "GroupL1(groups='filters', weighted=True)"]
    # and it is saved and loaded with the rest
    again = build(kind, [{"params": [p]}, {"params": [q], "regularizer": second.make()}], first)
    again.load_state_dict(through_disk(optimizer.state_dict()))
    assert [g["lam"] for g in again.param_groups] == [LAM, 0.2]


@every_optimizer
def test_a_group_that_is_refused_leaves_the_optimizer_as_it_was(kind: str) -> None:
    p = weight_of(REGULARISERS[0])
    optimizer = build(kind, [p], REGULARISERS[0])
    for wrong in ({"regularizer": tb.GroupL1("kernels")}, {"lr": -1.0}, {"regularizer": tb.L1}):
        with pytest.raises(ValueError, match=r"kernels|lr|regularizer"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))], **wrong})
    assert len(optimizer.param_groups) == len(optimizer.regularizers) == 1
    walk(optimizer, p, random_gradients(p, 1))


@every_optimizer
def test_tied_weights(kind: str) -> None:
    case = REGULARISERS[0]

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.encode.weight = self.decode.weight = nn.Parameter(case.start(dtype=torch.float64)[:5])

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(torch.tanh(self.encode(x)))

    model = Tied()
    plain = nn.Parameter(model.encode.weight.detach().clone())
    optimizer, other = build(kind, model.parameters(), case), build(kind, [plain], case)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        (g,) = torch.autograd.grad((torch.tanh(x @ plain.T) @ plain.T).square().sum(), [plain])
        optimizer.step()
        walk(other, plain, [g])
        close(model.encode.weight, plain, 1e-12)
    assert model.encode.weight is model.decode.weight
    assert len(optimizer.param_groups[0]["params"]) == 1
    assert len(optimizer.state) <= 1


@either_path
@every_optimizer
def test_parameters_without_a_gradient_are_left_alone(kind: str, foreach: bool) -> None:
    case = REGULARISERS[0]
    p, idle = weight_of(case, torch.float32), weight_of(case, torch.float32, seed=3)
    frozen = nn.Parameter(torch.randn(LINEAR, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    before, kept = idle.detach().clone(), frozen.detach().clone()
    optimizer = build(kind, [p, idle, frozen], case, foreach=foreach, weight_decay=0.1)
    walk(optimizer, p, random_gradients(p, 4))
    same(idle, before)
    same(frozen, kept)
    assert idle not in optimizer.state
    assert frozen not in optimizer.state
    gradients = random_gradients(idle, 3, seed=9)  # it starts when its first gradient comes
    other = weight_of(case, torch.float32, seed=3)
    p.grad = None
    walk(optimizer, idle, gradients)
    walk(build(kind, [other], case, foreach=foreach, weight_decay=0.1), other, gradients)
    same(idle, other)


# ---------------------------------------------------------------------- weights changed from outside


class Net(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def rewrite(case: Case, p: Tensor) -> Tensor:
    return case.start(seed=77, dtype=p.dtype)


def edit_clamp(net: Net, case: Case) -> None:
    net.weight.data.clamp_(-0.15, 0.15)


def edit_scale(net: Net, case: Case) -> None:
    net.weight.data.mul_(0.5)


def edit_copy(net: Net, case: Case) -> None:
    net.weight.data.copy_(rewrite(case, net.weight))


def edit_checkpoint(net: Net, case: Case) -> None:
    net.load_state_dict({"weight": rewrite(case, net.weight)})


def edit_storage(net: Net, case: Case) -> None:
    net.weight.data = rewrite(case, net.weight)


def edit_kill(net: Net, case: Case) -> None:
    """Every second live entry to zero, and with group regularisers so every entry of some group."""
    flat = net.weight.data.view(-1)
    flat[flat.nonzero().flatten()[::2]] = 0
    net.weight.data[:2] = 0


def edit_kill_one_group(net: Net, case: Case) -> None:
    if case.labels is None:
        net.weight.data[3] = 0
        return
    labels = torch.from_numpy(case.labels)
    net.weight.data[labels == labels[net.weight != 0][0]] = 0


def edit_wake(net: Net, case: Case) -> None:
    """Some zeros get a small value: in dead groups too."""
    flat = net.weight.data.view(-1)
    zeros = (flat == 0).nonzero().flatten() if case.name != "nuclear" else torch.arange(len(flat))
    flat[zeros[::3]] = 0.2


def edit_everything(net: Net, case: Case) -> None:
    net.weight.data.zero_()


EDITS = {name.removeprefix("edit_"): f for name, f in list(globals().items()) if name.startswith("edit_")}
QUIET = pytest.mark.parametrize("kind", ["linbreg", "linbreg-paper", "linbreg-sgd", "adabreg"])


def trained(kind: str, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Net, Any]:
    net = Net(case.start(dtype=dtype))
    optimizer = build(kind, net.parameters(), case, **options)
    walk(optimizer, net.weight, random_gradients(net.weight, 10))
    noop_step(optimizer)
    return net, optimizer


def untouched_dual(case: Case, changed: Tensor) -> Tensor:
    """The entries whose dual an edit of `changed` has no reason to touch."""
    if case.name in ("l1", "nonnegative", "elastic-net"):
        return ~changed
    if case.labels is None:
        return torch.zeros_like(changed)
    labels = torch.from_numpy(case.labels)
    return ~torch.isin(labels, labels[changed])


@pairwise(
    {
        "case": those(),
        "edit": list(EDITS),
        "kind": ["linbreg", "linbreg-paper", "linbreg-sgd", "adabreg"],
        "foreach": PATHS,
    }
)
def test_edited_weights_are_honoured(case: Case, edit: str, kind: str, foreach: bool) -> None:
    net, optimizer = trained(kind, case, foreach=foreach)
    before, v = net.weight.detach().clone(), optimizer.state[net.weight]["dual"].clone()
    EDITS[edit](net, case)
    edited = net.weight.detach().clone()
    changed = edited != before
    assert changed.any()
    pointer = net.weight.data_ptr()
    noop_step(optimizer)
    close(net.weight, edited, 5e-6)
    assert net.weight.data_ptr() == pointer
    if case.name != "nuclear":
        assert torch.equal(net.weight != 0, edited != 0)
    now = optimizer.state[net.weight]["dual"].clone()
    quiet = untouched_dual(case, changed)
    if case.name == "elastic-net":  # not told that its entries stand alone, so they are rounded again
        close(now[quiet], v[quiet], 5e-6)
    else:
        same(now[quiet], v[quiet])
    again = net.weight.detach().clone()
    for _ in range(3):  # and there is no drift
        noop_step(optimizer)
    close(net.weight, again, 1e-6)
    close(optimizer.state[net.weight]["dual"], now, 2e-6)


@cases(elastic=False)
def test_scaling_from_outside_keeps_the_whole_memory(case: Case) -> None:
    """p ∈ ∂J does not depend on the length of θ, so v moves by Δθ/δ and by nothing else."""
    net, optimizer = trained("linbreg", case, torch.float64, delta=0.5)
    before, v = net.weight.detach().clone(), optimizer.state[net.weight]["dual"].clone()
    net.weight.data.mul_(0.25)
    noop_step(optimizer)
    close(optimizer.state[net.weight]["dual"], v - 0.75 * before / 0.5, 1e-12)
    assert int((before == 0).sum()) > 0 or case.name == "nuclear"


def test_a_weight_set_to_zero_waits_at_the_threshold() -> None:
    """p stays as near as it can be: it takes little to bring the weight back, and nothing brings it back by itself."""
    net, optimizer = trained("linbreg", REGULARISERS[0], torch.float64)
    before = net.weight.detach().clone()
    net.weight.data.zero_()
    noop_step(optimizer)
    live, v = before != 0, optimizer.state[net.weight]["dual"]
    close(v[live], LAM * before[live].sign(), 1e-12)
    assert bool((v.abs() <= LAM).all())
    walk(optimizer, net.weight, [-1e-3 * before.sign()])
    assert torch.equal(net.weight.detach().sign()[live], before.sign()[live])


def test_sparse_group_keeps_the_memory_of_zeros_in_an_edited_live_group() -> None:
    case = next(c for c in REGULARISERS if c.name == "sparse-group-rows")
    net, optimizer = trained("linbreg", case, torch.float64)
    v, w = optimizer.state[net.weight]["dual"].clone(), net.weight.detach().clone()
    mixed = ((w != 0).any(1) & (w == 0).any(1)).nonzero().flatten()
    assert len(mixed)
    row = int(mixed[0])
    live, dead = (w[row] != 0).nonzero().flatten(), (w[row] == 0).nonzero().flatten()
    net.weight.data[row, live[0]] += 0.3
    noop_step(optimizer)
    close(optimizer.state[net.weight]["dual"][row, dead], v[row, dead], 1e-12)
    assert bool((v[row, dead] != 0).any())


@quick
@given(seed=st.integers(0, 10**6), share=st.floats(0.02, 1), lam=st.floats(0, 2), delta=st.floats(0.25, 4))
def test_any_edit_is_honoured(seed: int, share: float, lam: float, delta: float) -> None:
    case = REGULARISERS[0]
    net, optimizer = trained("linbreg", case, torch.float64, lam=lam, delta=delta)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(LINEAR, generator=generator) < share
    values = torch.randn(LINEAR, generator=generator, dtype=torch.float64)
    values = values * (torch.rand(LINEAR, generator=generator) < 0.5)
    before, v = net.weight.detach().clone(), optimizer.state[net.weight]["dual"].clone()
    net.weight.data.copy_(torch.where(mask, values, before))
    edited = net.weight.detach().clone()
    noop_step(optimizer)
    close(net.weight, edited, 1e-12)
    assert torch.equal(net.weight != 0, edited != 0)
    same(optimizer.state[net.weight]["dual"][edited == before], v[edited == before])


@QUIET
@cases(none=True)
def test_swapping_in_an_average_and_back_leaves_no_trace(case: Case, kind: str) -> None:
    net, optimizer = trained(kind, case)
    other, undisturbed = trained(kind, case)
    average = nn.Parameter(rewrite(case, net.weight))
    kept = net.weight.detach().clone()
    net.weight.data.copy_(average)  # evaluated here
    net.weight.data.copy_(kept)
    mine, theirs = net.weight.data, average.data
    net.weight.data, average.data = theirs, mine  # the other way to do it
    net.weight.data, average.data = mine, theirs
    gradients = random_gradients(net.weight, 5, seed=4)
    walk(optimizer, net.weight, gradients)
    walk(undisturbed, other.weight, gradients)
    same(net.weight, other.weight)
    for name, value in undisturbed.state[other.weight].items():
        if isinstance(value, Tensor):
            same(optimizer.state[net.weight][name], value)


@cases(none=True)
def test_training_goes_on_from_the_edited_weights(case: Case) -> None:
    """A checkpoint loaded after the state exists: live weights then move as a fresh optimizer would move them."""
    net, optimizer = trained("linbreg", case, torch.float64)
    edit_checkpoint(net, case)
    start = net.weight.detach().clone()
    fresh = Net(start.clone())
    g = random_gradients(net.weight, 1, seed=4, scale=1e-3)
    walk(optimizer, net.weight, g)
    walk(build("linbreg", fresh.parameters(), case), fresh.weight, g)
    live = start != 0
    if case.name.startswith("sparse"):  # the zeros of a live group remember, and may come alive
        close(net.weight[live], fresh.weight[live], 1e-3)
    elif case.name != "nuclear":
        close(net.weight[live], fresh.weight[live], 1e-12)
    close(net.weight, start, 1e-2)
    assert not torch.equal(net.weight[live], start[live])


@pytest.mark.parametrize("edit", ["scale", "kill", "wake"])
@cases(none=True)
def test_edited_weights_without_any_strength(case: Case, edit: str) -> None:
    """λ = 0 with a regulariser and δ ≠ 1: there is nothing to remember, and nothing to divide by."""
    net, optimizer = trained("linbreg", case, lam=0.0, delta=0.3)
    if edit == "wake":
        net.weight.data.view(-1)[::3] = 0.2
    else:
        EDITS[edit](net, case)
    edited = net.weight.detach().clone()
    noop_step(optimizer)
    close(net.weight, edited, 5e-6)


@pytest.mark.parametrize("lam", [0.0, 0.1, 3.0])
@cases()
def test_edit_and_new_strength_between_the_same_two_steps(case: Case, lam: float) -> None:
    net, optimizer = trained("linbreg", case)
    edit_copy(net, case)
    edited = net.weight.detach().clone()
    changed = ~untouched_dual(case, torch.ones_like(edited, dtype=torch.bool))
    optimizer.param_groups[0]["lam"] = lam
    noop_step(optimizer)
    assert net.weight.isfinite().all()
    assert optimizer.state[net.weight]["dual"].isfinite().all()
    live = edited != 0 if case.name != "nuclear" else changed
    close(net.weight[live & changed], edited[live & changed], 1e-5)


def test_negative_weights_are_not_for_the_nonnegative_regulariser() -> None:
    """An edit that J forbids is brought back to what it allows; the rest stays."""
    case = REGULARISERS[1]
    net, optimizer = trained("linbreg", case)
    net.weight.data[0] = -0.5
    kept = net.weight.detach()[1:].clone()
    noop_step(optimizer)
    assert bool((net.weight >= 0).all())
    same(net.weight[0], torch.zeros(5))
    close(net.weight[1:], kept, 1e-6)


# ---------------------------------------------------------------------- saving, loading, going on


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


@every_optimizer
@cases(none=True)
def test_state_dict_is_tensors_and_plain_values(case: Case, kind: str) -> None:
    p = weight_of(case)
    optimizer = build(kind, [p], case)
    walk(optimizer, p, random_gradients(p, 2))
    state_dict = optimizer.state_dict()
    assert set(state_dict) == {"state", "param_groups"}
    assert plain(state_dict["param_groups"])
    for group in optimizer.param_groups:
        assert plain({k: v for k, v in group.items() if k != "params"})
    for state in state_dict["state"].values():
        for name, value in state.items():
            assert value is not None, "distributed checkpoints break on None"
            assert type(value) is Tensor or plain(value), (name, value)
    loaded = through_disk(state_dict)
    assert loaded["param_groups"] == state_dict["param_groups"]


@every_optimizer
@cases(none=True)
def test_resume_equals_the_uninterrupted_run(case: Case, kind: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if case.name == "nuclear" and dtype == torch.bfloat16:
            continue
        p = weight_of(case, dtype)
        gradients = random_gradients(p, 16)
        optimizer = build(kind, [p], case)
        walk(optimizer, p, gradients[:8])
        saved = through_disk({"weight": p.detach(), "optimizer": optimizer.state_dict()})
        walk(optimizer, p, gradients[8:])
        q = nn.Parameter(saved["weight"])
        resumed = build(kind, [q], case, lam=9.9, lr=1e-6)  # what is saved is what counts
        resumed.load_state_dict(saved["optimizer"])
        walk(resumed, q, gradients[8:])
        same(p, q)
        for name, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                same(resumed.state[q][name], value)


@pytest.mark.parametrize("lam", [torch.full(LINEAR, 0.3), torch.full((6, 1), 0.3)], ids=["entries", "rows"])
def test_resume_with_a_tensor_lam(lam: Tensor) -> None:
    case = REGULARISERS[0]
    for dtype in (torch.float32, torch.bfloat16):
        p = weight_of(case, dtype)
        optimizer = build("linbreg", [p], case, lam=lam)
        walk(optimizer, p, random_gradients(p, 5))
        saved = through_disk({"weight": p.detach(), "optimizer": optimizer.state_dict()})
        q = nn.Parameter(saved["weight"])
        resumed = build("linbreg", [q], case)
        resumed.load_state_dict(saved["optimizer"])
        walk(optimizer, p, random_gradients(p, 5, seed=2))
        walk(resumed, q, random_gradients(p, 5, seed=2))
        same(p, q)
        same(resumed.state[q]["dual"], optimizer.state[p]["dual"])


def test_loaded_state_is_a_copy() -> None:
    case = REGULARISERS[0]
    p = weight_of(case)
    optimizer = build("linbreg", [p], case)
    walk(optimizer, p, random_gradients(p, 2))
    state_dict = optimizer.state_dict()
    q = nn.Parameter(p.detach().clone())
    other = build("linbreg", [q], case)
    other.load_state_dict(state_dict)
    v = state_dict["state"][0]["dual"].clone()
    walk(other, q, random_gradients(p, 2))
    same(state_dict["state"][0]["dual"], v)


OTHERS = {
    "another-kind": (tb.L1(), tb.NonNegativeL1()),
    "none-to-l1": (None, tb.L1()),
    "l1-to-none": (tb.L1(), None),
    "other-groups": (tb.GroupL1("rows"), tb.GroupL1("columns")),
    "other-weights": (tb.GroupL1("rows"), tb.GroupL1("rows", weighted=False)),
    "other-ratio": (tb.SparseGroupL1("rows", l1_ratio=0.5), tb.SparseGroupL1("rows", l1_ratio=0.6)),
    "other-index": (tb.GroupL1(INDEX), tb.GroupL1(INDEX.flip(0))),
    "other-parameter": (ElasticNet(0.5), ElasticNet(0.25)),
}


@every_optimizer
@pytest.mark.parametrize("pair", list(OTHERS))
def test_state_of_another_regulariser_is_refused(pair: str, kind: str) -> None:
    saved, mine = OTHERS[pair]
    cls, options = OPTIMIZERS[kind]
    p = weight_of(REGULARISERS[0])
    q = nn.Parameter(p.detach().clone())
    optimizer = cls([p], regularizer=saved, lam=LAM, **options)
    other = cls([q], regularizer=mine, lam=LAM, **options)
    walk(optimizer, p, random_gradients(p, 2))
    with pytest.raises(ValueError, match=r"(?s)regularizer.*group 0.*\.$"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state
    assert not other._optimizer_load_state_dict_pre_hooks
    walk(other, q, random_gradients(q, 1))  # unharmed


def test_state_of_torchs_own_optimizer_is_refused() -> None:
    p = weight_of(REGULARISERS[0])
    sgd = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    walk(sgd, p, random_gradients(p, 1))
    optimizer = tb.LinBreg([p], regularizer=tb.L1(), lam=LAM)
    optimizer.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="dual"):
        walk(optimizer, p, random_gradients(p, 1))


# ---------------------------------------------------------------------- what the user is told


@every_dual
@cases()
def test_a_dense_start_warns_once(case: Case, kind: str) -> None:
    p = nn.Parameter(torch.rand(case.shape, generator=torch.Generator().manual_seed(0)))
    optimizer = build(kind, [p], case)
    p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match=r"1 of 1 .*sparse_init_") as caught:
        optimizer.step()
    assert len(caught) == 1
    optimizer.step()  # warnings are errors here


def test_the_warning_points_at_the_line_that_took_the_step() -> None:
    p = nn.Parameter(torch.ones(LINEAR))
    optimizer = tb.LinBreg([p], regularizer=tb.L1(), lam=LAM)
    p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="sparse_init_") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


def test_a_low_rank_start_is_sparse_for_the_nuclear_norm() -> None:
    """Its sparsity is the rank: u vᵀ has no zero entry, and is what such a run should start from."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(8, 1, generator=generator) @ torch.randn(1, 6, generator=generator))
    walk(tb.LinBreg([p], regularizer=tb.NuclearNorm(), lam=LAM), p, [torch.zeros_like(p)])


def test_starts_that_do_not_warn() -> None:
    dense, sparse = nn.Parameter(torch.ones(LINEAR)), weight_of(REGULARISERS[0])
    optimizer = tb.LinBreg([{"params": [dense]}, {"params": [sparse], "regularizer": tb.L1(), "lam": 0.1}])
    dense.grad, sparse.grad = torch.ones_like(dense), torch.ones_like(sparse)
    optimizer.step()
    prox = tb.ProxSGD([dense], regularizer=tb.L1(), lam=0.1)
    prox.step()  # no dual: it can start dense


NAN, INF = math.nan, math.inf
ALL = (tb.LinBreg, tb.AdaBreg, tb.ProxSGD)
BAD: list[tuple[tuple[type, ...], dict[str, Any], str, str]] = [
    *[(ALL, {"lr": x}, "lr", repr(x)) for x in (-0.1, NAN, INF, -INF, None, "fast", "0.1", [0.1])],
    (ALL, {"lr": torch.tensor(-0.5)}, "lr", "-0.5"),
    (ALL, {"lr": torch.tensor([0.1, 0.2])}, "lr", "(2,)"),
    *[(ALL, {"lam": x}, "lam", repr(x)) for x in (-1.0, NAN, INF, None, "much")],
    (ALL, {"lam": torch.tensor([[0.1, -0.25]])}, "lam", "-0.25"),
    (ALL, {"lam": torch.tensor([[0.1, NAN]])}, "lam", "nan"),
    *[(ALL[:2], {"delta": x}, "delta", repr(x)) for x in (0.0, -1.0, NAN, INF, None)],
    *[(ALL, {"weight_decay": x}, "weight_decay", repr(x)) for x in (-0.1, NAN, INF)],
    *[((tb.LinBreg, tb.ProxSGD), {"momentum": x}, "momentum", repr(x)) for x in (1.0, 1.5, -0.1, NAN)],
    *[((tb.LinBreg,), {"momentum_rule": x}, "momentum_rule", repr(x)) for x in ("adam", None, "")],
    ((tb.LinBreg,), {"momentum": 0.9, "nesterov": True}, "nesterov", "True"),
    ((tb.LinBreg,), {"momentum_rule": "sgd", "nesterov": True}, "nesterov", "True"),
    ((tb.ProxSGD,), {"nesterov": True}, "nesterov", "True"),
    *[((tb.AdaBreg,), {"betas": x}, "betas", repr(x)) for x in (0.9, (0.9,), (0.9, 0.99, 0.999), None)],
    ((tb.AdaBreg,), {"betas": (1.0, 0.999)}, "betas", "1.0"),
    ((tb.AdaBreg,), {"betas": (0.9, -0.5)}, "betas", "-0.5"),
    ((tb.AdaBreg,), {"betas": (0.9, NAN)}, "betas", "nan"),
    *[((tb.AdaBreg,), {"eps": x}, "eps", repr(x)) for x in (-1e-8, NAN, INF)],
    (ALL, {"fused": True, "foreach": True}, "fused", "True"),
    (ALL, {"regularizer": tb.L1}, "regularizer", "L1"),
    (ALL, {"regularizer": "l1"}, "regularizer", "'l1'"),
    (ALL, {"regularizer": tb.GroupL1("kernels")}, "groups", "kernels"),
    (ALL, {"regularizer": tb.SparseGroupL1("filters")}, "groups", "filters"),
    (ALL, {"regularizer": tb.GroupL1(torch.zeros(4, 4, dtype=torch.long))}, "groups", "(4, 4)"),
]


@pairwise(
    {
        "cls": ALL,
        "classes,options,name,value": {"-".join(f"{k}={v!r}" for k, v in bad[1].items()): bad for bad in BAD},
        "where": ["constructor", "group"],
    },
    where=lambda cls, classes, **_: cls in classes,
)
def test_bad_options_are_named(
    cls: type, classes: tuple[type, ...], options: dict[str, Any], name: str, value: str, where: str
) -> None:
    p = weight_of(REGULARISERS[0])
    group = {"params": [p], **options}
    with pytest.raises(ValueError, match=name) as caught:
        cls([group]) if where == "group" else cls(**group)
    assert value in str(caught.value)
    assert str(caught.value).endswith("."), "a sentence"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [LINEAR, (1,), ()], ids=str)
def test_vectors_and_scalars_can_be_regularised(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in OPTIMIZERS:
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        optimizer = build(kind, [p], REGULARISERS[0], lr=0.05, lam=0.06)
        walk(optimizer, p, [torch.ones_like(p)] * 60)
        assert p.shape == shape
        assert bool((p < 0).all())


@every_optimizer
def test_closure_is_called_and_its_loss_returned(kind: str) -> None:
    p = weight_of(REGULARISERS[0])
    optimizer = build(kind, [p], REGULARISERS[0])
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p - 1).square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    first = optimizer.step(closure)
    assert [first.item()] == calls
    for _ in range(30):
        optimizer.step(closure)
    assert len(calls) == 31
    assert calls[-1] < calls[0]
    assert optimizer.step() is None


# ---------------------------------------------------------------------- a prox at every k-th step


def _low_rank(seed: int = 0) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(
        torch.randn(12, 1, generator=generator) @ torch.randn(1, 9, generator=generator), requires_grad=True
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [tb.LinBreg, tb.AdaBreg])
def test_prox_every_moves_v_at_every_step_and_writes_at_every_kth(kind: type, fused: bool) -> None:
    p, q = _low_rank(), _low_rank()
    lazy = kind([p], lr=0.05, lam=0.3, regularizer=tb.NuclearNorm(prox_every=3), fused=fused)
    eager = kind([q], lr=0.05, lam=0.3, regularizer=tb.NuclearNorm(), fused=False)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 8):
        before = p.detach().clone()
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
        lazy.step(), eager.step()
        torch.testing.assert_close(lazy.state[p]["dual"], eager.state[q]["dual"])
        if step % 3:
            assert torch.equal(p, before)
        else:
            torch.testing.assert_close(p, q)
            assert not torch.equal(p, before)


def test_prox_every_takes_as_few_decompositions_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: taken.append(1) or svd(*args, **kwargs))
    p = _low_rank()
    optimizer = tb.LinBreg([p], lr=0.05, lam=0.3, regularizer=tb.NuclearNorm(prox_every=4))
    p.grad = torch.randn(p.shape)
    optimizer.step()
    taken.clear()
    for _ in range(8):
        optimizer.step()
    assert len(taken) == 2


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("through_data", [False, True])
def test_an_edit_between_two_proxes_is_honoured(at: int, through_data: bool) -> None:
    p = _low_rank()
    optimizer = tb.LinBreg([p], lr=0.0, lam=0.3, regularizer=tb.NuclearNorm(prox_every=3))
    new = _low_rank(5).detach()
    for step in range(7):
        p.grad = torch.randn(p.shape)
        optimizer.step()
        if step == at:
            with torch.no_grad():
                (p.data if through_data else p).copy_(new)
    torch.testing.assert_close(p.detach(), new)


def test_prox_every_resumes_in_the_middle() -> None:
    def run(stop: int | None) -> torch.Tensor:
        p = _low_rank()
        make = functools.partial(tb.AdaBreg, lr=0.05, lam=0.3, regularizer=tb.NuclearNorm(prox_every=3))
        optimizer = make([p])
        generator = torch.Generator().manual_seed(1)
        for step in range(8):
            if step == stop:
                file = io.BytesIO()
                torch.save([optimizer.state_dict(), p.detach()], file)
                file.seek(0)
                state, weight = torch.load(file, weights_only=True)
                p = torch.nn.Parameter(weight)
                optimizer = make([p])
                optimizer.load_state_dict(state)
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return p.detach()

    for stop in range(1, 8):
        assert torch.equal(run(None), run(stop))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_a_bad_prox_every_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="prox_every"):
        tb.NuclearNorm(prox_every=value)  # type: ignore[arg-type]
