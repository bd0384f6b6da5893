"""Every regulariser, on every kind of weight: its prox is the minimiser, its subgradients are subgradients."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import FLOATS, ElasticNet, covering, labels
from scipy import optimize
from torch import Tensor

import torch_bregman as tb

Array = np.ndarray
Value = Callable[[Array], float]

SHAPES = {
    "linear": (5, 7),
    "conv3x3": (4, 3, 3, 3),
    "conv1x1": (6, 4, 1, 1),
    "conv1d": (4, 3, 5),
    "depthwise": (6, 1, 3, 3),
}
BY_NAME = {2: ("rows", "columns"), 3: ("kernels", "filters", "channels"), 4: ("kernels", "filters", "channels")}


def index(groups: str, shape: tuple[int, ...]) -> str | Tensor:
    """What `groups=` gets: a name, a full index tensor, or one that broadcasts."""
    if not groups.startswith("index"):
        return groups
    full = torch.from_numpy(labels(groups, shape).copy())
    return full if groups == "index" else full[(slice(None), *(slice(0, 1) for _ in shape[1:]))]


def naive_l1(w: Array, lam: Array) -> float:
    return sum(float(le * abs(x)) for le, x in zip(np.broadcast_to(lam, w.shape).flat, w.flat, strict=True))


def naive_group(w: Array, lam: Array, which: Array, weighted: bool) -> float:
    """λ Σ_g √n_g ‖w_g‖₂, one entry after the other; λ is constant in a group."""
    squares: dict[int, float] = {}
    sizes: dict[int, int] = {}
    lams: dict[int, float] = {}
    for le, g, x in zip(np.broadcast_to(lam, w.shape).flat, which.flat, w.flat, strict=True):
        squares[g] = squares.get(g, 0.0) + float(x) ** 2
        sizes[g] = sizes.get(g, 0) + 1
        lams[g] = float(le)
    return sum(lams[g] * (math.sqrt(sizes[g]) if weighted else 1.0) * math.sqrt(squares[g]) for g in squares)


STEPS: dict[tuple[Case, int], float] = {}


@dataclass(frozen=True)
class Case:
    kind: str
    shape: tuple[int, ...]
    groups: str = ""
    weighted: bool = True
    l1_ratio: float = 0.0

    @property
    def reg(self) -> tb.Regularizer:
        groups = index(self.groups, self.shape)
        match self.kind:
            case "L1":
                return tb.L1()
            case "NonNegativeL1":
                return tb.NonNegativeL1()
            case "NuclearNorm":
                return tb.NuclearNorm()
            case "GroupL1":
                return tb.GroupL1(groups, weighted=self.weighted)
        return tb.SparseGroupL1(groups, l1_ratio=self.l1_ratio, weighted=self.weighted)

    def naive(self, w: Array, lam: float | Array = 1.0) -> float:
        """J(w) from the table of the method, in float64."""
        w, lam = np.asarray(w, dtype=np.float64), np.asarray(lam, dtype=np.float64)
        match self.kind:
            case "L1":
                return naive_l1(w, lam)
            case "NonNegativeL1":
                return naive_l1(w, lam) if (w >= 0).all() else math.inf
            case "NuclearNorm":
                return float(lam * np.linalg.svd(w.reshape(len(w), -1), compute_uv=False).sum())
            case "GroupL1":
                return naive_group(w, lam, labels(self.groups, self.shape), self.weighted)
        a = self.l1_ratio
        group = naive_group(w, lam, labels(self.groups, self.shape), self.weighted)
        return a * naive_l1(w, lam) + (1 - a) * group

    @property
    def seed(self) -> int:
        return zlib.crc32(repr(self).encode())

    def generator(self, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + salt)

    def sample(self, dtype: torch.dtype = torch.float64, salt: int = 0) -> tuple[Tensor, float]:
        """A point and a step that leaves some of it alive and some not."""
        gen = self.generator(salt)
        x = torch.randn(self.shape, generator=gen, dtype=torch.float64)
        if self.groups:
            which = torch.from_numpy(labels(self.groups, self.shape).copy())
            x *= torch.rand(int(which.max()) + 1, generator=gen, dtype=torch.float64).add(0.05)[which] * 2
        if self.kind == "NuclearNorm":
            return x.to(dtype), float(torch.linalg.svdvals(x.flatten(1)).median()) * 1.01
        return x.to(dtype), self.step(salt, x)

    def step(self, salt: int, x: Tensor) -> float:
        """The first that leaves a third alive, coming from far too much; looked for once per case."""
        if (self, salt) not in STEPS:
            steps = [float(x.abs().max()) * 10 * 0.93**k for k in range(120)]
            STEPS[self, salt] = next(t for t in steps if (self.reg.prox(x, t) != 0).double().mean() > 0.3)
        return STEPS[self, salt]


def cases() -> list[Case]:
    found = []
    for name, shape in SHAPES.items():
        found += [Case(kind, shape) for kind in ("L1", "NonNegativeL1", "NuclearNorm")]
        by_index = ("index", "index of rows") if name in ("linear", "conv3x3") else ()
        for groups in (*BY_NAME[len(shape)], *by_index):
            found += [Case("GroupL1", shape, groups), Case("SparseGroupL1", shape, groups, l1_ratio=0.3)]
        first = BY_NAME[len(shape)][0]
        found.append(Case("GroupL1", shape, first, weighted=False))
        found.append(Case("SparseGroupL1", shape, first, weighted=False, l1_ratio=0.5))
    found += [
        Case("SparseGroupL1", SHAPES["linear"], groups, l1_ratio=a)
        for groups in ("columns", "index")
        for a in (0.0, 1.0)
    ]
    return found


NAMES = {shape: name for name, shape in SHAPES.items()}


def name_of(case: Case) -> str:
    parts = [case.kind, NAMES.get(case.shape, "small"), case.groups.replace(" ", "_")]
    parts.append(f"{case.l1_ratio:g}" if case.kind == "SparseGroupL1" else "")
    return "-".join([part for part in parts if part] + ([] if case.weighted else ["unweighted"]))


CASES = cases()


def those(*, strength: int = 2, nuclear: bool = True) -> pytest.MarkDecorator:
    """Some of `CASES`: every two (`strength`) of kind, shape, groups, weighting and ratio meet that do in all."""
    rows = [dataclasses.astuple(case) for case in CASES if nuclear or case.kind != "NuclearNorm"]
    return pytest.mark.parametrize("case", [Case(*row) for row in covering(rows, strength)], ids=name_of)


def those_in_either_dtype(strength: int = 2) -> pytest.MarkDecorator:
    """The same with the dtype as one more trait."""
    rows = covering([(*dataclasses.astuple(case), name) for case in CASES for name in FLOATS], strength)
    found = [(Case(*traits), name) for *traits, name in rows]
    params = [pytest.param(case, FLOATS[name], id=f"{name_of(case)}-{name}") for case, name in found]
    return pytest.mark.parametrize(("case", "dtype"), params)


every = those()
objects_that_fit_any_matrix = pytest.mark.parametrize(
    "reg",
    [tb.L1(), tb.NonNegativeL1(), tb.GroupL1("rows"), tb.SparseGroupL1("columns", 0.3), tb.NuclearNorm()],
    ids=["L1", "NonNegativeL1", "GroupL1", "SparseGroupL1", "NuclearNorm"],
)
both = pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 3e-5


def test_the_samples_are_half_alive():
    """Otherwise the tables below would check only live, or only dead weights."""
    for case in CASES:
        x, step = case.sample()
        s = case.reg.prox(x, step)
        if case.kind == "NuclearNorm":
            assert 0 < tb.NuclearNorm().rank(s) < min(x.flatten(1).shape)
        elif case.groups and len(np.unique(labels(case.groups, case.shape))) == 1:
            assert s.any()  # one group only
        else:
            assert 0.25 < float((s != 0).double().mean()) < 0.9


# ---------------------------------------------------------------------- value


@those(strength=3)
def test_value_is_the_double_loop(case):
    x, _ = case.sample()
    weight = x.abs() if case.kind == "NonNegativeL1" else x
    for lam in (1.0, 0.3):
        assert float(case.reg.value(weight, lam)) == pytest.approx(case.naive(weight.numpy(), lam), rel=1e-12)
    assert float(case.reg.value(torch.zeros_like(x))) == 0
    assert case.reg.value(weight).shape == ()
    assert case.reg.value(weight, torch.tensor(0.3, dtype=x.dtype)).shape == ()


@those(nuclear=False)
def test_value_and_prox_with_a_lambda_per_group(case):
    """λ as a tensor: the prox minimises the value with the same λ."""
    x, step = case.sample()
    gen = case.generator(1)
    which = labels(case.groups, case.shape) if case.groups else np.arange(x.numel()).reshape(case.shape)
    lam = torch.rand(int(which.max()) + 1, generator=gen, dtype=x.dtype)[torch.from_numpy(which.copy())] + 0.1
    weight = x.abs() if case.kind == "NonNegativeL1" else x
    assert float(case.reg.value(weight, lam)) == pytest.approx(case.naive(weight.numpy(), lam.numpy()), rel=1e-12)
    assert minimises(case, x, case.reg.prox(x, step * lam), lambda z: case.naive(z, step * lam.numpy()))


@pytest.mark.parametrize("kind", ["L1", "NonNegativeL1", "GroupL1", "SparseGroupL1"])
def test_a_lambda_per_row_broadcasts(kind):
    case = Case(kind, (5, 7), "rows" if "Group" in kind else "", l1_ratio=0.3)
    x, step = case.sample()
    weight = x.abs()
    lam = torch.arange(1.0, 6.0, dtype=x.dtype).unsqueeze(1) / 3
    assert float(case.reg.value(weight, lam)) == pytest.approx(case.naive(weight.numpy(), lam.numpy()), rel=1e-12)
    assert torch.equal(case.reg.prox(x, step * lam), case.reg.prox(x, step * lam.expand(5, 7)))
    one_by_one = torch.cat([row(case, x[i : i + 1], step * float(lam[i])) for i in range(5)])
    assert torch.allclose(case.reg.prox(x, step * lam), one_by_one, rtol=0, atol=1e-14)


def row(case: Case, x: Tensor, step: float) -> Tensor:
    return dataclasses.replace(case, shape=tuple(x.shape)).reg.prox(x, step)


@pytest.mark.parametrize("case", [Case("GroupL1", (5, 7), "rows"), Case("SparseGroupL1", (5, 7), "rows", l1_ratio=0.3)])
def test_a_lambda_that_varies_within_a_group_is_consistent_or_refused(case):
    """`value` reads such a λ as its mean over the group; then the prox must be the prox of that."""
    x, step = case.sample()
    lam = torch.rand(x.shape, generator=case.generator(1), dtype=x.dtype) + 0.1
    try:
        s = case.reg.prox(x, step * lam)
    except ValueError:
        return
    assert minimises(case, x, s, lambda z: float(case.reg.value(torch.from_numpy(z), step * lam)))


def test_nuclear_norm_takes_one_lambda_only():
    """λ per row or per entry means nothing for singular values; a silent broadcast would compute something else."""
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    for lam in (torch.full((5, 1), 0.3), torch.full((5, 7), 0.3), torch.linspace(0.1, 1, 5)):
        with pytest.raises(ValueError, match=r"lam|λ|step|scalar|one"):
            tb.NuclearNorm().prox(x, lam)
        with pytest.raises(ValueError, match=r"lam|λ|step|scalar|one"):
            tb.NuclearNorm().value(x, lam)
    scalar = torch.tensor(0.3)
    assert torch.allclose(tb.NuclearNorm().prox(x, scalar), tb.NuclearNorm().prox(x, 0.3))


@those(nuclear=False)
def test_value_has_a_finite_gradient_where_groups_are_zero(case):
    """The Lasso baseline differentiates J by autograd; at zero groups that must not be 0/0."""
    x, step = case.sample()
    weight = case.reg.prox(x, step).requires_grad_()
    case.reg.value(weight, 0.3).backward()
    assert weight.grad is not None
    alive = weight.detach() != 0
    wanted = 0.3 * case.reg.subgradient(weight.detach())
    assert weight.grad.isfinite().all()
    assert torch.allclose(weight.grad[alive], wanted[alive], atol=1e-12)


# ---------------------------------------------------------------------- the prox is the minimiser


def around(case: Case, x: Tensor, s: Tensor, salt: int = 2) -> list[Array]:
    """Points near and far from s: noise of all sizes, sparse noise, and the points on the way to x and to 0."""
    gen = case.generator(salt)
    points = [x, 0 * s, -s, 2 * s, s + 0.01 * (x - s), 0.99 * s, s.abs(), x.clamp_min(0)]
    for scale in (1e-3, 1e-1, 1.0):
        for share in (0.03, 0.3, 1.0):
            noise = torch.randn(s.shape, generator=gen, dtype=s.dtype)
            points.append(s + scale * noise * (torch.rand(s.shape, generator=gen) < share))
    if case.kind == "NonNegativeL1":
        points += [point.abs() for point in points]
    return [point.double().numpy() for point in points]


def minimises(case: Case, x: Tensor, s: Tensor, penalty: Value) -> bool:
    """F(z) ≥ F(s) + ‖z − s‖²/2 for F(z) = penalty(z) + ‖z − x‖²/2: true of the minimiser and of nothing else."""
    x64, s64 = x.double().numpy(), s.double().numpy()
    at_s = penalty(s64) + 0.5 * np.sum((s64 - x64) ** 2)
    slack = tolerance(s.dtype) * max(1.0, float(at_s))
    return all(
        penalty(z) + 0.5 * np.sum((z - x64) ** 2) >= at_s + 0.5 * np.sum((z - s64) ** 2) - slack
        for z in around(case, x, s)
    )


@those_in_either_dtype(strength=3)
def test_prox_is_the_minimiser(case, dtype):
    x, step = case.sample(dtype)
    s = case.reg.prox(x, step)
    assert s.shape == x.shape
    assert s.dtype == dtype

    def penalty(z: Array) -> float:
        return case.naive(z, step)

    assert minimises(case, x, s, penalty)
    # and the check can tell: with another step the same code finds another point, which fails it
    assert not minimises(case, x, case.reg.prox(x, 0.8 * step), penalty)
    tensor_step = torch.tensor(step, dtype=dtype)
    assert torch.allclose(case.reg.prox(x, tensor_step), s, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["L1", "NonNegativeL1"])
def test_prox_is_the_argmin_over_a_grid(kind):
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    reg = tb.L1() if kind == "L1" else tb.NonNegativeL1()
    for x in (-3.1, -0.7, -0.2, 0.0, 0.4, 0.6999, 0.7001, 2.5):
        cost = 0.7 * grid.abs() + (grid - x) ** 2 / 2
        if kind == "NonNegativeL1":
            cost[grid < 0] = math.inf
        found = reg.prox(torch.tensor([x], dtype=torch.float64), 0.7)
        assert abs(float(found) - float(grid[cost.argmin()])) <= 1.01e-4


def solve_dual(case: Case, x: Array, step: float) -> Array:
    """prox(x) = x − projection of x on step·∂J₁(0), found by SLSQP: a smooth problem and no closed form.

    The dual ball of the sparse group norm is the sum of two balls: |q| ≤ α·step and ‖r_g‖ ≤ (1−α)·step·√n_g.
    """  # fmt: skip
    which, n = labels(case.groups, case.shape).ravel(), x.size
    a = case.l1_ratio if case.kind == "SparseGroupL1" else 0.0
    groups = [which == g for g in np.unique(which)]
    bounds = [(-a * step, a * step)] * n + [(None, None)] * n
    radius = [(1 - a) * step * math.sqrt(g.sum() if case.weighted else 1) for g in groups]

    def away(qr: Array) -> tuple[float, Array]:
        gap = qr[:n] + qr[n:] - x.ravel()
        return 0.5 * gap @ gap, np.concatenate([gap, gap])

    def inside(qr: Array) -> Array:
        return np.array([r**2 - np.sum(qr[n:][g] ** 2) for g, r in zip(groups, radius, strict=True)])

    def slope(qr: Array) -> Array:
        return np.array([np.concatenate([np.zeros(n), np.where(g, -2 * qr[n:], 0)]) for g in groups])

    found = optimize.minimize(
        away, np.zeros(2 * n), jac=True, bounds=bounds, method="SLSQP",
        constraints={"type": "ineq", "fun": inside, "jac": slope}, options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    assert found.status in (0, 8), found.message  # 8: no further progress, at the limit of the floats
    return x - (found.x[:n] + found.x[n:]).reshape(x.shape)


@pytest.mark.parametrize(
    "case",
    [
        Case("GroupL1", (3, 4), "rows"),
        Case("GroupL1", (3, 4), "columns"),
        Case("GroupL1", (3, 4), "index", weighted=False),
        Case("GroupL1", (2, 2, 3), "kernels"),
        Case("SparseGroupL1", (3, 4), "rows", l1_ratio=0.4),
        Case("SparseGroupL1", (3, 4), "index", l1_ratio=0.7),
        Case("SparseGroupL1", (2, 2, 3), "channels", weighted=False, l1_ratio=0.2),
    ],
    ids=name_of,
)
def test_group_prox_is_what_an_independent_solver_finds(case):
    x, step = case.sample()
    step *= 0.7
    found = solve_dual(case, x.numpy(), step)
    s = case.reg.prox(x, step).numpy()
    assert np.abs(s).max() > 0.05
    assert np.abs(s - found).max() < 2e-5


def test_nuclear_prox_is_what_an_independent_solver_finds():
    """‖X‖_* = min ½(‖U‖² + ‖V‖²) over X = UVᵀ: a smooth problem without singular values."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    step = 0.8

    def cost(uv: Array) -> tuple[float, Array]:
        u, v = uv[:9].reshape(3, 3), uv[9:].reshape(4, 3)
        gap = u @ v.T - x
        value = 0.5 * np.sum(gap**2) + 0.5 * step * np.sum(uv**2)
        return value, np.concatenate([(gap @ v + step * u).ravel(), (gap.T @ u + step * v).ravel()])

    start = np.random.default_rng(1).normal(size=21)
    found = optimize.minimize(cost, start, jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}).x
    s = tb.NuclearNorm().prox(torch.from_numpy(x), step).numpy()
    assert np.abs(s - found[:9].reshape(3, 3) @ found[9:].reshape(4, 3).T).max() < 1e-5
    assert np.abs(s).max() > 0.05


def test_sparse_group_is_linear_in_lambda():
    """Twice the λ is twice the penalty; λ² in one of the two parts is a bug seen elsewhere."""
    reg = tb.SparseGroupL1("rows", l1_ratio=0.4)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for lam in (0.1, 0.5, 3.0):
        assert float(reg.value(x, lam)) == pytest.approx(lam * float(reg.value(x)), rel=1e-13)
    # both parts at work in one row, by hand: soft threshold by 0.4·λ, then the norm falls by 0.6·λ·√2
    s = tb.SparseGroupL1("rows", l1_ratio=0.4).prox(torch.tensor([[3.4, -4.4]], dtype=torch.float64), 1.0)
    assert torch.allclose(s, torch.tensor([[3.0, -4.0]], dtype=torch.float64) * (1 - 0.6 * math.sqrt(2) / 5))


def test_groups_carry_the_root_of_their_size():
    ones = torch.ones(2, 9, dtype=torch.float64)
    assert float(tb.GroupL1("rows").value(ones)) == pytest.approx(2 * 3 * 3)
    assert float(tb.GroupL1("rows", weighted=False).value(ones)) == pytest.approx(2 * 3)
    kernels = torch.ones(2, 3, 1, 1, dtype=torch.float64)
    assert float(tb.GroupL1("kernels").value(kernels)) == float(tb.L1().value(kernels))


def test_a_named_grouping_is_its_index():
    for shape in SHAPES.values():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name in BY_NAME[len(shape)]:
            number = torch.from_numpy(labels(name, shape).copy())
            for a, b in (
                (tb.GroupL1(name), tb.GroupL1(number)),
                (tb.SparseGroupL1(name, 0.3), tb.SparseGroupL1(number.int(), 0.3)),
            ):
                assert torch.allclose(a.prox(x, 0.4), b.prox(x, 0.4), atol=1e-14)
                assert torch.allclose(a.thresholds(x), b.thresholds(x), atol=1e-12)
                mask = torch.zeros(shape, dtype=torch.bool)
                mask.view(-1)[1] = True
                assert torch.equal(a.coupled(mask), b.coupled(mask))


# ---------------------------------------------------------------------- subgradients


def is_subgradient(case: Case, p: Tensor, s: Tensor, x: Tensor, slack: float) -> bool:
    """J(z) ≥ J(s) + ⟨p, z − s⟩ at many z."""
    s64, p64, at_s = s.double().numpy(), p.double().numpy(), case.naive(s.double().numpy())
    scale = slack * max(1.0, at_s)
    return all(
        case.naive(z) >= at_s + np.sum(p64 * (z - s64)) - scale * (1 + np.abs(z).sum()) for z in around(case, x, s)
    )


@those_in_either_dtype(strength=3)
def test_subgradients_satisfy_the_inequality(case, dtype):
    x, step = case.sample(dtype)
    reg, slack = case.reg, tolerance(dtype)
    s = reg.prox(x, step)
    near = 3 * torch.randn(case.shape, generator=case.generator(3), dtype=dtype)
    for p in ((x - s) / step, reg.subgradient(s), reg.nearest_subgradient(s, near)):
        assert p.shape == s.shape
        assert p.dtype == dtype
        assert is_subgradient(case, p, s, x, slack)
    # what is no subgradient is found out
    assert not is_subgradient(case, 1.5 * reg.subgradient(s) + 0.1, s, x, slack)
    assert not is_subgradient(case, near, s, x, slack)


@every
def test_subgradient_is_zero_where_zero_is_allowed(case):
    x, step = case.sample()
    s = case.reg.prox(x, step)
    p = case.reg.subgradient(s)
    if case.kind != "NuclearNorm":  # there an entry is no unit; see the test of the compact subgradient
        assert (p[s == 0] == 0).all()
    assert (case.reg.subgradient(torch.zeros_like(s)) == 0).all()


@every
def test_nearest_subgradient_is_the_projection(case):
    """⟨near − q, p − q⟩ ≤ 0 for every p ∈ ∂J(s): the one property that only the nearest q has."""
    x, step = case.sample()
    reg, gen = case.reg, case.generator(4)
    other, other_step = case.sample(salt=5)
    for s in (reg.prox(x, step), torch.zeros_like(x), reg.prox(other, 0.2 * other_step)):
        feasible = [reg.subgradient(s), reg.nearest_subgradient(s, torch.zeros_like(s))]
        if not s.any():  # at zero: what the prox takes away, without nearest_subgradient
            feasible += [y - reg.prox(y, 1.0) for y in torch.randn(20, *case.shape, generator=gen, dtype=x.dtype) * 3]
        else:
            feasible += [(x - s) / step] if torch.equal(s, reg.prox(x, step)) else []
        for scale in (0.3, 3.0, 30.0):
            far = scale * torch.randn(20, *case.shape, generator=gen, dtype=x.dtype)
            feasible += [reg.nearest_subgradient(s, point) for point in far]
        for scale in (0.5, 3.0):
            near = scale * torch.randn(case.shape, generator=gen, dtype=x.dtype)
            q = reg.nearest_subgradient(s, near)
            slack = 1e-8 * (1 + float(near.square().sum()))
            others = torch.stack(feasible)
            assert float(((near - q) * (others - q)).flatten(1).sum(1).max()) <= slack
            assert float((near - q).norm()) <= float((near - others).flatten(1).norm(dim=1).min()) + slack
            assert torch.allclose(reg.nearest_subgradient(s, q), q, atol=1e-9)  # a subgradient is its own nearest


def test_nearest_subgradient_keeps_what_the_dual_remembers():
    """A p that is a subgradient already comes back as it is, so a dual below the threshold is not forgotten."""
    for case in CASES:
        x, step = case.sample()
        s = case.reg.prox(x, step)
        held = (x - s) / step
        assert torch.allclose(case.reg.nearest_subgradient(s, held), held, atol=1e-9)
        if case.kind != "NuclearNorm" and (s == 0).any():
            assert float(held[s == 0].abs().max()) > 0.01  # there is something to remember


@those_in_either_dtype()
def test_the_start_of_the_dual_gives_the_weights_back(case, dtype):
    """prox_{δJ}(δ(θ/δ + λp)) = θ."""
    x, step = case.sample(dtype)
    theta = case.reg.prox(x, step)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    for delta in (0.5, 1.0, 3.0):
        for lam in (0.1, 1.0):
            v = theta / delta + lam * case.reg.subgradient(theta)
            back = case.reg.prox(delta * v, delta * lam)
            assert torch.allclose(back, theta, rtol=1e-5, atol=atol)
            if case.kind != "NuclearNorm":
                assert torch.equal(back == 0, theta == 0)
            v = theta / delta + lam * case.reg.nearest_subgradient(theta, 2 * torch.ones_like(theta))
            assert torch.allclose(case.reg.prox(delta * v, delta * lam), theta, rtol=1e-5, atol=atol)


# ---------------------------------------------------------------------- properties of the prox


@every
def test_homogeneity(case):
    x, step = case.sample()
    reg = case.reg
    assert reg.homogeneous
    for c in (0.2, 7.0):
        weight = x.abs()
        assert float(reg.value(c * weight)) == pytest.approx(c * float(reg.value(weight)), rel=1e-12)
        assert torch.allclose(reg.prox(c * x, c * step), c * reg.prox(x, step), rtol=1e-9, atol=1e-12)
        s = reg.prox(x, step)
        assert torch.allclose(reg.subgradient(c * s), reg.subgradient(s), atol=1e-9)
        assert float((reg.subgradient(s) * s).sum()) == pytest.approx(float(reg.value(s)), rel=1e-9)


@every
def test_firmly_nonexpansive(case):
    x, step = case.sample()
    for salt in range(6, 12):
        y = x + torch.randn(case.shape, generator=case.generator(salt), dtype=x.dtype) * 10.0 ** (salt - 9)
        gap = case.reg.prox(x, step) - case.reg.prox(y, step)
        assert float(gap.square().sum()) <= float((gap * (x - y)).sum()) + 1e-12 * float((x - y).square().sum())


@those_in_either_dtype()
def test_zeros_are_exact(case, dtype):
    """Not small: zero. At a threshold entries are zero, so the weights of an exact density are."""
    x, step = case.sample(dtype)
    s = case.reg.prox(x, step)
    if case.kind != "NuclearNorm":
        assert not ((s != 0) & (s.abs() < 1e-9)).any()
        assert (s == 0).any() or bool((case.reg.thresholds(x) > step).all())
        if case.kind == "GroupL1":  # whole groups
            for g in np.unique(labels(case.groups, case.shape)):
                inside = torch.from_numpy(labels(case.groups, case.shape) == g)
                assert bool((s[inside] == 0).all()) or bool((s[inside] != 0).all())
    assert (case.reg.prox(x, 1e30) == 0).all()
    assert (case.reg.prox(x, torch.tensor(1e30, dtype=dtype)) == 0).all()


@those_in_either_dtype()
def test_edges(case, dtype):
    """Zero input, zero groups, no step, an enormous step: no NaN anywhere."""
    x, step = case.sample(dtype)
    reg, zero = case.reg, torch.zeros(case.shape, dtype=dtype)
    for t in (0.0, step, 1e30, torch.tensor(step, dtype=dtype), torch.tensor(0.0, dtype=dtype)):
        assert (reg.prox(zero, t) == 0).all()
    assert (reg.thresholds(zero) == 0).all()
    assert float(reg.lambda_max(zero)) == 0
    assert (reg.nearest_subgradient(zero, zero) == 0).all()
    kept = reg.prox(x, 0.0)
    wanted = x.clamp_min(0) if case.kind == "NonNegativeL1" else x
    if case.kind == "NuclearNorm":
        assert torch.allclose(kept, wanted, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(kept, wanted)
    holed = x.clone()
    holed[0] = 0
    holed[:, 0] = 0
    for result in (
        reg.prox(holed, step), reg.subgradient(holed.abs()), reg.nearest_subgradient(holed.abs(), x),
        reg.thresholds(holed), reg.lambda_max(holed), reg.value(holed.abs()),
    ):  # fmt: skip
        assert result.isfinite().all()


@pytest.mark.parametrize("shape", [(5, 0), (0, 5)])
@objects_that_fit_any_matrix
def test_weights_without_entries(reg, shape):
    """Nothing to penalise: J = 0, nothing alive, zero at every λ. A Linear with no inputs is such a weight."""
    x = torch.zeros(shape, dtype=torch.float64)
    for result in (reg.prox(x, 0.1), reg.subgradient(x), reg.nearest_subgradient(x, x), reg.thresholds(x)):
        assert result.shape == shape
    assert float(reg.value(x, 0.3)) == 0
    assert float(reg.alive(x)) == 0
    assert float(reg.lambda_max(x)) == 0


@every
def test_the_arguments_are_not_changed(case):
    x, step = case.sample()
    weight, before = x.abs(), x.clone()
    case.reg.prox(x, step)
    case.reg.thresholds(x)
    case.reg.nearest_subgradient(weight, x)
    case.reg.subgradient(weight)
    case.reg.value(weight)
    assert torch.equal(x, before)
    assert torch.equal(weight, before.abs())


# ---------------------------------------------------------------------- thresholds


def check_thresholds(reg: tb.Regularizer, v: Tensor) -> None:
    """prox(v, λ) ≠ 0 exactly where λ is below the threshold, for λ close to and between all thresholds."""
    found = reg.thresholds(v)
    assert found.shape == v.shape
    levels = found.flatten().unique()
    close = torch.cat([levels * (1 - 1e-5), levels * (1 + 1e-5), (levels[1:] + levels[:-1]) / 2])
    safe = [float(lam) for lam in close if lam > 0 and float(((levels - lam).abs() / lam).min()) > 5e-6]
    assert safe
    for lam in safe[:: max(1, len(safe) // 60)]:
        wrong = (reg.prox(v, lam) != 0) != (found > lam)
        assert not wrong.any(), f"at λ = {lam:.6g}: {int(wrong.sum())} of {v.numel()} entries"


@every
def test_thresholds(case):
    x, _ = case.sample()
    check_thresholds(case.reg, x)


@those(nuclear=False)
def test_thresholds_of_entries_that_are_zero(case):
    """Where v = 0 (a pixel that is always black) the weight is zero at every λ, also in a live group."""
    x, _ = case.sample()
    x.view(-1)[::3] = 0
    assert (case.reg.thresholds(x).view(-1)[::3] == 0).all()
    check_thresholds(case.reg, x)


@every
def test_lambda_max(case):
    x, _ = case.sample()
    top = case.reg.lambda_max(x)
    assert top.shape == ()
    assert (case.reg.prox(x, float(top) * (1 + 1e-5)) == 0).all()
    assert (case.reg.prox(x, float(top) * (1 - 1e-3)) != 0).any()


def test_lambda_max_is_the_dual_norm():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, generator=gen, dtype=torch.float64)
    assert float(tb.L1().lambda_max(x)) == float(x.abs().max())
    assert float(tb.NonNegativeL1().lambda_max(-x.abs())) == 0
    assert float(tb.GroupL1("rows").lambda_max(x)) == pytest.approx(float(x.norm(dim=1).max()) / math.sqrt(7))
    assert float(tb.NuclearNorm().lambda_max(x)) == pytest.approx(float(torch.linalg.matrix_norm(x, 2)))


# ---------------------------------------------------------------------- rank


@pytest.mark.parametrize("shape", [(20, 15), (8, 3, 3, 3)], ids=["linear", "conv"])
@both
def test_a_rank_one_start_stays_rank_one(shape, dtype):
    """One tiny random step. The full U Vᵀ as p would put all zero singular values on the threshold: rank 15 at once."""
    gen = torch.Generator().manual_seed(0)
    rows, rest = shape[0], math.prod(shape[1:])
    start = torch.randn(rows, 1, generator=gen, dtype=dtype) @ torch.randn(1, rest, generator=gen, dtype=dtype)
    noise = torch.randn(shape, generator=gen, dtype=dtype)
    reg, lam = tb.NuclearNorm(), 0.1
    assert reg.rank(start.view(shape)) == 1
    v = start.view(shape) + lam * reg.subgradient(start.view(shape)) - 1e-3 * noise
    assert reg.rank(reg.prox(v, lam)) == 1

    u, _, vh = torch.linalg.svd(start, full_matrices=False)
    full = start + lam * (u @ vh) - 1e-3 * noise.flatten(1)
    assert reg.rank(reg.prox(full.view(shape), lam)) >= 5

    weight = torch.nn.Parameter(start.view(shape).clone())
    optimizer = tb.LinBreg(
        [{"params": [weight], "regularizer": reg, "lam": lam}], lr=1e-3,
    )  # fmt: skip
    weight.grad = noise
    optimizer.step()
    assert reg.rank(weight.detach()) == 1


def test_rank_counts_what_is_not_rounding():
    gen = torch.Generator().manual_seed(0)
    for dtype in FLOATS.values():
        for rank in (1, 3, 6):
            left = torch.randn(10, rank, generator=gen, dtype=dtype)
            weight = left @ torch.randn(rank, 8, generator=gen, dtype=dtype)
            assert tb.NuclearNorm().rank(weight) == rank
            assert int(torch.count_nonzero(torch.linalg.svdvals(weight))) == 8  # the wrong count
    assert tb.NuclearNorm().rank(torch.zeros(4, 5)) == 0
    assert tb.NuclearNorm().rank(torch.diag(torch.tensor([1.0, 0.1, 0.01]))) == 3
    assert tb.NuclearNorm(rtol=0.05).rank(torch.diag(torch.tensor([1.0, 0.1, 0.01]))) == 2


# ---------------------------------------------------------------------- mistakes


GROUPED = pytest.mark.parametrize("make", [tb.GroupL1, tb.SparseGroupL1])


@GROUPED
@pytest.mark.parametrize(
    ("groups", "shape"),
    [
        ("rows", (4, 3, 3, 3)), ("columns", (4, 3, 5)), ("kernels", (4, 3)), ("filters", (4, 3)), ("channels", (4, 3)),
        ("rows", (4,)), ("kernels", (4,)),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit_are_named(make, groups, shape):
    reg, weight = make(groups), torch.ones(shape)
    for call in (lambda: reg.check(weight.shape), lambda: reg.prox(weight, 0.1), lambda: reg.value(weight)):
        with pytest.raises(ValueError, match=groups) as error:
            call()
        assert str(tuple(shape)) in str(error.value)


@GROUPED
def test_an_unknown_name_of_groups_lists_the_choices(make):
    with pytest.raises(ValueError, match="'row'") as error:
        make("row")
    for choice in ("rows", "columns", "kernels", "filters", "channels", "index tensor"):
        assert choice in str(error.value)


@GROUPED
def test_index_tensors_are_checked(make):
    for bad in (torch.zeros(4, 3), torch.tensor([0, 1, -1]), torch.tensor([], dtype=torch.long), 3, None):
        with pytest.raises(ValueError, match="`groups`"):
            make(bad)
    reg = make(torch.zeros(4, 3, dtype=torch.long))
    for shape in ((3, 4), (4, 3, 1), (8, 3)):
        for call in (reg.check, lambda shape: reg.prox(torch.ones(shape), 0.1)):
            with pytest.raises(ValueError, match=r"\(4, 3\)"):
                call(torch.Size(shape))


def test_l1_ratio_is_checked():
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="l1_ratio"):
            tb.SparseGroupL1("rows", l1_ratio=bad)


def test_nuclear_norm_needs_a_matrix():
    with pytest.raises(ValueError, match="2 dimensions"):
        tb.NuclearNorm().check(torch.Size([5]))


# ---------------------------------------------------------------------- the objects


OBJECTS = {
    "L1": tb.L1(),
    "NonNegativeL1": tb.NonNegativeL1(),
    "GroupL1": tb.GroupL1("rows", weighted=False),
    "GroupL1-index": tb.GroupL1(torch.arange(6).view(2, 3) % 2),
    "SparseGroupL1": tb.SparseGroupL1("columns", l1_ratio=0.3),
    "NuclearNorm": tb.NuclearNorm(rtol=1e-3),
}
objects = pytest.mark.parametrize("reg", OBJECTS.values(), ids=list(OBJECTS))


@objects
def test_frozen(reg):
    for name in ("groups", "l1_ratio", "rtol", "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(reg, name, 0.5)


@objects
def test_copies_do_the_same(reg):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for other in (copy.copy(reg), copy.deepcopy(reg), pickle.loads(pickle.dumps(reg))):
        assert type(other) is type(reg)
        assert repr(other) == repr(reg)
        assert torch.equal(other.prox(x, 0.2), reg.prox(x, 0.2))


@objects
def test_repr_is_short_and_says_what_matters(reg):
    text = repr(reg)
    assert len(text) < 80
    assert "\n" not in text
    assert "0x" not in text
    assert text.startswith(type(reg).__name__ + "(")


def test_repr_tells_regularisers_apart():
    """A checkpoint compares these texts, so what computes differently must read differently."""
    texts = [repr(reg) for reg in OBJECTS.values()]
    texts += [repr(tb.GroupL1("rows")), repr(tb.GroupL1("columns", weighted=False)), repr(tb.NuclearNorm())]
    texts += [repr(tb.SparseGroupL1("columns", l1_ratio=0.4)), repr(tb.GroupL1(torch.arange(6).view(2, 3) % 3))]
    assert len(set(texts)) == len(texts)
    assert repr(tb.GroupL1(torch.arange(6))) == repr(tb.GroupL1(torch.arange(6, dtype=torch.int32)))


def test_equality():
    assert tb.L1() == tb.L1()
    assert tb.NonNegativeL1() == tb.NonNegativeL1()
    assert tb.L1() != tb.NonNegativeL1()
    assert tb.NuclearNorm() == tb.NuclearNorm()
    assert tb.NuclearNorm() != tb.NuclearNorm(rtol=1e-3)
    assert len({tb.L1(), tb.L1(), tb.NonNegativeL1()}) == 2
    index_reg = tb.GroupL1(torch.arange(6))
    assert index_reg == index_reg
    assert {index_reg: 1}[index_reg] == 1  # hashable, tensor and all


# ---------------------------------------------------------------------- your own


class Weighted(tb.Regularizer):
    """J = λ Σ c|θ|, with the three methods that must be written."""

    homogeneous = True
    c = 0.5

    def value(self, weight, lam=1.0):
        return (lam * self.c * weight.abs()).sum()

    def prox(self, x, step):
        return x.sign() * (x.abs() - step * self.c).clamp_min(0)

    def subgradient(self, weight):
        return self.c * weight.sign()


class Rows(tb.Regularizer):
    """J = λ Σ_rows ‖θ_r‖: entries hang together, and no method says so."""

    homogeneous = True

    def value(self, weight, lam=1.0):
        return (lam * weight.norm(dim=1)).sum()

    def prox(self, x, step):
        norm = x.norm(dim=1, keepdim=True)
        return x * (1 - step / norm.clamp_min(1e-30)).clamp_min(0)

    def subgradient(self, weight):
        return weight / weight.norm(dim=1, keepdim=True).clamp_min(1e-30)


def test_custom_defaults_of_a_separable_one():
    gen = torch.Generator().manual_seed(0)
    reg, v = Weighted(), torch.randn(4, 6, generator=gen, dtype=torch.float64)
    weight = reg.prox(v, 1.0)
    assert 0 < int((weight == 0).sum()) < 24
    near = 2 * torch.randn(4, 6, generator=gen, dtype=torch.float64)
    wanted = torch.where(weight == 0, near.clamp(-0.5, 0.5), 0.5 * weight.sign())
    assert torch.allclose(reg.nearest_subgradient(weight, near), wanted, atol=1e-12)
    assert torch.allclose(reg.thresholds(v), v.abs() / 0.5, rtol=1e-9)
    check_thresholds(reg, v)
    assert float(reg.lambda_max(v)) == pytest.approx(float(v.abs().max()) / 0.5)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    assert not reg.coupled(mask).any()
    mask[1, 2] = True
    assert reg.coupled(mask).all()
    assert reg.coupled(mask).shape == mask.shape
    reg.check(torch.Size([3]))
    for size in (1e-20, 1e20):
        assert torch.allclose(reg.thresholds(size * v), size * v.abs() / 0.5, rtol=1e-6)
    assert (reg.thresholds(torch.zeros(3)) < 1e-20).all()
    assert reg.thresholds(torch.zeros(0)).shape == (0,)


def test_custom_defaults_of_one_that_is_not_homogeneous():
    gen = torch.Generator().manual_seed(0)
    reg, v = ElasticNet(mu=1.0), torch.randn(4, 6, generator=gen, dtype=torch.float64)
    weight = reg.prox(v, 0.7)
    near = 3 * torch.randn(4, 6, generator=gen, dtype=torch.float64)
    wanted = torch.where(weight == 0, near.clamp(-1, 1), weight.sign() + weight)
    assert torch.allclose(reg.nearest_subgradient(weight, near), wanted, atol=1e-6)
    check_thresholds(reg, v)
    assert float(reg.lambda_max(v)) == pytest.approx(float(v.abs().max()))


def test_custom_defaults_of_one_with_groups():
    gen = torch.Generator().manual_seed(0)
    reg, v = Rows(), torch.randn(4, 6, generator=gen, dtype=torch.float64)
    v[0] *= 0.1
    check_thresholds(reg, v)
    assert float(reg.lambda_max(v)) == pytest.approx(float(v.norm(dim=1).max()))
    weight = reg.prox(v, 1.0)
    assert (weight[0] == 0).all()
    assert (weight[1:] != 0).all()
    near = 3 * torch.randn(4, 6, generator=gen, dtype=torch.float64)
    p = reg.nearest_subgradient(weight, near)
    assert torch.allclose(p[0], near[0] / near[0].norm())
    assert torch.allclose(p[1:], weight[1:] / weight[1:].norm(dim=1, keepdim=True))


def test_custom_groups_with_a_single_zero_in_a_live_group():
    """There ∂J is one point: the zero entry's p is 0. Anything else would bring the entry back at the next step."""
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    near = torch.full_like(weight, 0.3)
    p = Rows().nearest_subgradient(weight, near)
    assert float(Rows().prox(weight + p, 1.0)[0, 1]) == 0
    assert torch.allclose(p[1], near[1])


def test_a_custom_one_trains():
    weight = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = tb.LinBreg([weight], lr=0.1, regularizer=Weighted(), lam=1.0)
    target = torch.zeros_like(weight)
    target[0, :3] = 2.0
    for _ in range(60):
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().mul(0.5).backward()
        optimizer.step()
    assert torch.equal(weight != 0, target != 0)
    assert torch.allclose(weight, target, atol=0.05)


def test_the_three_methods_are_needed():
    weight = torch.ones(2, 2)
    bare = tb.Regularizer()
    for call in (lambda: bare.value(weight), lambda: bare.prox(weight, 1.0), lambda: bare.subgradient(weight)):
        with pytest.raises(NotImplementedError):
            call()
