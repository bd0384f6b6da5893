"""The convergence theory on convex problems in float64: where the iterates go, and how the loss falls.

LinBreg: v⁺ = v − τ∇L(θ), θ = prox_{δJ}(δv), that is v = p + θ/δ with p ∈ ∂J(θ).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cases import pairwise
from scipy import optimize
from torch import Tensor, nn

import torch_bregman as tb

Array = np.ndarray
Loss = Callable[[Tensor], tuple[float, Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


@dataclass
class LeastSquares:
    """L(θ) = ½‖Aθ − b‖², θ as a long vector; ∇L is Lipschitz with L = ‖A‖²."""

    A: Tensor
    b: Tensor

    def __call__(self, theta: Tensor) -> tuple[float, Tensor]:
        gap = self.A @ theta.reshape(-1) - self.b
        return float(0.5 * gap @ gap), (self.A.T @ gap).view_as(theta)

    @property
    def lipschitz(self) -> float:
        return float(torch.linalg.matrix_norm(self.A, 2) ** 2)

    @property
    def mu(self) -> float:
        return float(torch.linalg.svdvals(self.A).min() ** 2)


@dataclass
class Run:
    """LinBreg from v = 0 (or from a given start), a step at a time."""

    loss: Loss
    shape: tuple[int, ...]
    regularizer: tb.Regularizer | None
    lam: float
    tau: float
    delta: float = 1.0
    start: Tensor | None = None

    def __post_init__(self) -> None:
        zero = torch.zeros(self.shape, dtype=torch.float64)
        self.weight = nn.Parameter(zero if self.start is None else self.start.clone())
        self.optimizer = tb.LinBreg(
            [self.weight], lr=self.tau, regularizer=self.regularizer, lam=self.lam, delta=self.delta
        )

    def step(self, steps: int = 1) -> Tensor:
        for _ in range(steps):
            self.weight.grad = self.loss(self.weight.detach())[1]
            self.optimizer.step()
        return self.theta

    @property
    def theta(self) -> Tensor:
        return self.weight.detach().clone()

    @property
    def dual(self) -> Tensor:
        return self.optimizer.state[self.weight]["dual"].clone()

    @property
    def p(self) -> Tensor:
        """The subgradient of J = λJ₁ that the dual holds."""
        return self.dual - self.theta / self.delta


# ---------------------------------------------------------------------- underdetermined: argmin {J_δ(θ): Aθ = b}


def underdetermined(seed: int = 0, rows: int = 8, columns: int = 20) -> LeastSquares:
    """Aθ = b with a solution of three non-zeros among many others."""
    A = randn(rows, columns, seed=seed) / math.sqrt(rows)
    sparse = torch.zeros(columns, dtype=torch.float64)
    sparse[[2, 7, 13]] = torch.tensor([1.5, -1.0, 2.0], dtype=torch.float64)
    return LeastSquares(A, A @ sparse)


def split_quadratic_program(problem: LeastSquares, lam: float, delta: float) -> Array:
    """min λ‖θ‖₁ + ‖θ‖²/(2δ) with Aθ = b, primal: θ = x⁺ − x⁻ with x⁺, x⁻ ≥ 0 makes it smooth; SLSQP."""
    A, b = problem.A.numpy(), problem.b.numpy()
    n = A.shape[1]

    def cost(x: Array) -> tuple[float, Array]:
        theta = x[:n] - x[n:]
        slope = theta / delta
        return lam * x.sum() + theta @ theta / (2 * delta), np.concatenate([lam + slope, lam - slope])

    wide = np.hstack([A, -A])
    start = np.linalg.lstsq(wide, b, rcond=None)[0].clip(0)
    found = optimize.minimize(
        cost, start, jac=True, method="SLSQP", bounds=[(0, None)] * (2 * n),
        constraints={"type": "eq", "fun": lambda x: wide @ x - b, "jac": lambda x: wide},
        options={"maxiter": 1000, "ftol": 1e-15},
    )  # fmt: skip
    assert np.abs(wide @ found.x - b).max() < 1e-9
    return found.x[:n] - found.x[n:]


def grouped_dual(problem: LeastSquares, lam: float, delta: float, groups: Array) -> Array:
    """min λΣ√n_g‖θ_g‖ + ‖θ‖²/(2δ) with Aθ = b by BFGS on its smooth dual.

    max_y ⟨b, y⟩ − δ/2 Σ_g (‖(Aᵀy)_g‖ − λ√n_g)₊².
    """
    A, b = problem.A.numpy(), problem.b.numpy()
    size = np.sqrt(np.bincount(groups))

    def primal(y: Array) -> Array:
        z = A.T @ y
        norm = np.sqrt(np.bincount(groups, weights=z**2))
        return delta * z * (np.maximum(norm - lam * size, 0) / np.maximum(norm, 1e-300))[groups]

    def cost(y: Array) -> tuple[float, Array]:
        theta = primal(y)
        return theta @ theta / (2 * delta) - b @ y, A @ theta - b

    found = optimize.minimize(cost, b, jac=True, method="BFGS", options={"gtol": 1e-10, "maxiter": 5000})
    theta = primal(found.x)
    assert np.abs(A @ theta - b).max() < 1e-6
    return theta


def elastic_net(reg: tb.Regularizer, theta: Tensor, lam: float, delta: float) -> float:
    return float(reg.value(theta, lam) + theta.square().sum() / (2 * delta))


def assert_solves(reg: tb.Regularizer, problem: LeastSquares, theta: Tensor, lam: float, delta: float) -> None:
    """Feasible, and no feasible point nearby or far has a smaller J_δ: by convexity that is all."""
    A = problem.A
    assert float((A @ theta.reshape(-1) - problem.b).abs().max()) < 1e-6
    null = torch.linalg.svd(A)[2][A.shape[0] :]
    assert float((A @ null.T).abs().max()) < 1e-12
    here = elastic_net(reg, theta, lam, delta)
    for scale in (1e-3, 1e-1, 1.0):
        for w in randn(50, len(null), seed=9):
            other = theta + scale * (w @ null).view_as(theta)
            assert elastic_net(reg, other, lam, delta) > here - 1e-6 * scale


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("lam", "delta"), [(0.3, 1.0), (1.0, 1.0), (0.5, 3.0)])
def test_l1_finds_the_elastic_net_solution_of_a_linear_system(seed, lam, delta):
    """Against a primal quadratic program in split variables (SLSQP)."""
    problem = underdetermined(seed)
    run = Run(problem, (20,), tb.L1(), lam, tau=1 / (delta * problem.lipschitz), delta=delta)
    theta = run.step(2500)
    wanted = torch.from_numpy(split_quadratic_program(problem, lam, delta))
    assert float((theta - wanted).abs().max()) < 1e-5
    assert_solves(tb.L1(), problem, theta, lam, delta)
    assert 0.1 < float((theta == 0).double().mean()) < 0.9  # sparse, and the zeros are exact
    # another solution of Aθ = b is far: the one of least squares, where λ plays no part
    smallest = torch.linalg.lstsq(problem.A, problem.b).solution
    assert float((problem.A @ smallest - problem.b).abs().max()) < 1e-9
    assert float((theta - smallest).abs().max()) > 0.1


@pytest.mark.parametrize("groups", ["rows", "columns", "index"])
def test_group_l1_finds_its_solution_of_a_linear_system(groups):
    """Against the smooth dual problem, solved by BFGS."""
    lam, delta = 2.0, 1.0
    shape = {"rows": (12, 3), "columns": (3, 12), "index": (6, 6)}[groups]
    number = {
        "rows": np.repeat(np.arange(12), 3),
        "columns": np.tile(np.arange(12), 3),
        "index": np.arange(36) * 7 % 11,  # groups of three and four
    }[groups]
    sparse = torch.zeros(36, dtype=torch.float64)
    sparse[torch.from_numpy(number == 2)] = 2 * randn(int((number == 2).sum()), seed=4)
    A = torch.linalg.qr(randn(36, 14, seed=3))[0].T.contiguous()
    problem = LeastSquares(A, A @ sparse)
    reg = tb.GroupL1(torch.from_numpy(number).view(shape) if groups == "index" else groups)
    theta = Run(problem, shape, reg, lam, tau=1.8 / problem.lipschitz, delta=delta).step(1500)
    wanted = torch.from_numpy(grouped_dual(problem, lam, delta, number)).view(shape)
    assert float((theta - wanted).abs().max()) < 1e-5
    assert_solves(reg, problem, theta, lam, delta)
    dead = [g for g in range(number.max() + 1) if not theta.view(-1)[torch.from_numpy(number == g)].any()]
    assert 0 < len(dead) < number.max() + 1


def test_the_start_matters():
    """From another v₀ the limit is another solution: argmin of J_δ(θ) − ⟨v₀, θ⟩. So v₀ = 0 above was needed."""
    problem = underdetermined()
    tau = 1 / problem.lipschitz
    zero = Run(problem, (20,), tb.L1(), 0.5, tau).step(2500)
    start = 0.5 * randn(20, seed=5)
    other = Run(problem, (20,), tb.L1(), 0.5, tau, start=start)
    with pytest.warns(UserWarning, match="dense"):
        other.step()
    theta = other.step(2500)
    assert float((problem.A @ theta - problem.b).abs().max()) < 1e-6
    assert float((theta - zero).abs().max()) > 0.1


def basis_pursuit(problem: LeastSquares) -> Array:
    """min ‖θ‖₁ with Aθ = b, a linear program."""
    A, n = problem.A.numpy(), problem.A.shape[1]
    found = optimize.linprog(np.ones(2 * n), A_eq=np.hstack([A, -A]), b_eq=problem.b.numpy(), method="highs")
    assert found.status == 0
    return found.x[:n] - found.x[n:]


def test_more_lambda_approaches_basis_pursuit():
    """min λ‖θ‖₁ + ‖θ‖²/2 tends to the linear program as λ grows, and is it from some finite λ on."""
    problem = underdetermined(seed=2)
    wanted = torch.from_numpy(basis_pursuit(problem))
    errors, excess = [], []
    for lam, steps in ((0.03, 1000), (0.3, 2000), (3.0, 4000), (30.0, 8000)):
        theta = Run(problem, (20,), tb.L1(), lam, tau=1 / problem.lipschitz).step(steps)
        assert float((problem.A @ theta - problem.b).abs().max()) < 1e-5
        errors.append(float((theta - wanted).norm() / wanted.norm()))
        excess.append(float(theta.abs().sum() - wanted.abs().sum()))
    assert errors[0] > 0.2  # a small λ does not
    assert all(b < a or b < 1e-9 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-5
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(excess))
    assert abs(excess[-1]) < 1e-5
    assert torch.equal(theta.abs() > 1e-9, wanted.abs() > 1e-9)


# ---------------------------------------------------------------------- overdetermined: the minimiser of L


@pytest.mark.parametrize("reg", [tb.L1(), tb.GroupL1("rows"), tb.SparseGroupL1("columns", 0.3), tb.NuclearNorm()])
def test_a_unique_minimiser_is_found_whatever_the_regulariser(reg):
    """Bregman iterations have no bias: λ decides how they get there. ProxSGD at the same λ stops elsewhere."""
    problem = LeastSquares(randn(40, 12, seed=6) / 6, randn(40, seed=7))
    minimiser = torch.linalg.lstsq(problem.A, problem.b).solution.view(3, 4)
    theta = Run(problem, (3, 4), reg, 0.2, tau=1 / problem.lipschitz).step(1000)
    assert float((theta - minimiser).abs().max()) < 1e-6

    weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    baseline = tb.ProxSGD([weight], lr=1 / problem.lipschitz, regularizer=reg, lam=0.2)
    for _ in range(1000):
        weight.grad = problem(weight.detach())[1]
        baseline.step()
    assert float((weight.detach() - minimiser).abs().max()) > 0.05


# ---------------------------------------------------------------------- the loss falls, and by how much


CONVEX = {
    "L1": (tb.L1(), 0.3),
    "rows": (tb.GroupL1("rows"), 0.1),
    "columns": (tb.GroupL1("columns"), 0.1),
    "NuclearNorm": (tb.NuclearNorm(), 0.3),
}


@pairwise({"reg,lam": CONVEX, "delta": [0.5, 1.0, 4.0], "share": [0.3, 0.99]})
def test_the_loss_falls_by_the_amount_of_the_theorem(reg, lam, delta, share):
    """L(θ⁺) + D_sym/τ + (1/(δτ) − L/2)‖Δ‖² ≤ L(θ), with D_sym = ⟨p⁺ − p, Δ⟩, Δ = θ⁺ − θ.

    From v⁺ − v = −τ∇L(θ) and v = p + θ/δ:  −τ⟨∇L(θ), Δ⟩ = D_sym + ‖Δ‖²/δ,  and  L(θ⁺) ≤ L(θ) + ⟨∇L(θ), Δ⟩ + L/2‖Δ‖².
    So with the symmetric distance of J_δ, which is D_sym + ‖Δ‖²/δ:  L(θ⁺) + D_sym^δ/τ − L/2‖Δ‖² ≤ L(θ). The bracket is
    ≥ 0 for τ ≤ 2/(δL): the loss is monotone.
    """
    problem = LeastSquares(randn(25, 12, seed=8) / 5, randn(25, seed=9))
    L = problem.lipschitz
    tau = share * tb.step_size_bound(L, delta)
    assert tau == pytest.approx(share * 2 / (delta * L))
    run = Run(problem, (4, 3), reg, lam, tau, delta)
    theta, p, v = run.theta, torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    before, moved, distances = problem(theta)[0], 0, 0.0
    for _ in range(150):
        new = run.step()
        after, step = problem(new)[0], new - theta
        d_sym = float(tb.symmetric_bregman_distance(run.p, p, new, theta))
        d_sym_delta = float(tb.symmetric_bregman_distance(run.dual, v, new, theta))
        square = float(step.square().sum())
        slack = 1e-12 * max(1.0, before)
        assert d_sym >= -slack
        assert d_sym_delta == pytest.approx(d_sym + square / delta, abs=1e-12)
        assert after + d_sym / tau + (1 / (delta * tau) - L / 2) * square <= before + slack
        assert after + d_sym_delta / tau - L / 2 * square <= before + slack
        assert after <= before + slack
        moved, distances = moved + (square > 0), distances + d_sym
        theta, p, v, before = new, run.p, run.dual, after
    assert moved > 20
    assert distances > 1e-3  # the subgradients moved too, so their term was tested
    assert before < 0.9 * problem(torch.zeros(4, 3, dtype=torch.float64))[0]


def test_the_constants_of_the_theorem_are_sharp():
    """On a quadratic with one curvature the bound is an equation, so no larger constant would do."""
    problem = LeastSquares(2 * torch.eye(6, dtype=torch.float64), randn(6, seed=1))
    tau = 0.7 * tb.step_size_bound(4.0)
    run = Run(problem, (6,), tb.L1(), 0.1, tau)
    run.step(3)
    theta, v, before = run.theta, run.dual, problem(run.theta)[0]
    new = run.step()
    square = float((new - theta).square().sum())
    d_sym = float(tb.symmetric_bregman_distance(run.dual, v, new, theta))
    assert square > 1e-4
    assert problem(new)[0] + d_sym / tau - 4.0 / 2 * square == pytest.approx(before, rel=1e-12)


@pairwise({"reg,lam": CONVEX, "delta": [0.5, 4.0]})
def test_above_the_bound_the_loss_explodes(reg, lam, delta):
    problem = LeastSquares(randn(25, 12, seed=8) / 5, 3 * randn(25, seed=9))
    losses = {}
    for share in (0.99, 1.5):
        run = Run(problem, (4, 3), reg, lam, share * tb.step_size_bound(problem.lipschitz, delta), delta)
        losses[share] = [problem(run.step())[0] for _ in range(120)]
    start = problem(torch.zeros(4, 3, dtype=torch.float64))[0]
    assert losses[0.99][-1] < start
    assert losses[1.5][-1] > 1e3 * start


def test_step_size_bound():
    assert tb.step_size_bound(4.0) == 0.5
    assert tb.step_size_bound(4.0, delta=2.0) == 0.25
    for bad in (0.0, -1.0, math.nan, math.inf, "x"):
        with pytest.raises(ValueError, match="lipschitz"):
            tb.step_size_bound(bad)
        with pytest.raises(ValueError, match="delta"):
            tb.step_size_bound(1.0, delta=bad)


# ---------------------------------------------------------------------- strongly convex


@pytest.mark.parametrize("delta", [0.5, 2.0])
@pytest.mark.parametrize(
    ("reg", "lam"),
    [(tb.L1(), 0.3), (tb.GroupL1("rows"), 0.1), (tb.NuclearNorm(), 0.3)],
    ids=["L1", "rows", "NuclearNorm"],
)
def test_the_bregman_distance_to_the_minimiser_decreases(reg, lam, delta):
    """For τ ≤ μ/(2δL²): D⁺ ≤ D − ¾τμ‖e‖², with D = D_{J_δ}^v(θ*, θ) and e = θ − θ*.

    Three points: D⁺ = D − D(θ⁺, θ) + τ⟨∇L(θ), θ* − θ⁺⟩. Here D(θ⁺, θ) ≥ ‖Δ‖²/(2δ), ⟨∇L(θ), θ* − θ⟩ ≤ −μ‖e‖² and
    τ⟨∇L(θ), −Δ⟩ ≤ ‖Δ‖²/(2δ) + δτ²L²‖e‖²/2, so D⁺ ≤ D − τμ‖e‖² + δτ²L²‖e‖²/2, and δτL² ≤ μ/2.
    """
    problem = LeastSquares(randn(60, 12, seed=11) / 8, randn(60, seed=12))
    minimiser = torch.linalg.lstsq(problem.A, problem.b).solution.view(4, 3)
    tau = problem.mu / (2 * delta * problem.lipschitz**2)
    run = Run(problem, (4, 3), reg, lam, tau, delta)
    run.step()

    def distance() -> float:
        found = tb.bregman_distance(reg, minimiser, run.theta, lam=lam, delta=delta, subgradient=run.p)
        return float(found)

    found, euclidean = [distance()], [float((run.theta - minimiser).norm())]
    for _ in range(1500):
        run.step()
        found.append(distance())
        euclidean.append(float((run.theta - minimiser).norm()))
    assert found[0] > 0.05
    for (a, b), e in zip(itertools.pairwise(found), euclidean, strict=False):
        assert b <= a - 0.75 * tau * problem.mu * e**2 + 1e-13
    assert found[-1] < 1e-3 * found[0]
    assert all(d >= e**2 / (2 * delta) - 1e-10 for d, e in zip(found, euclidean, strict=True))  # it bounds the error
    assert found[0] > 1.01 * euclidean[0] ** 2 / (2 * delta)  # and is more than the Euclidean distance


def averaged_distance(c: float | None, steps: int, seeds: int, noise: float) -> tuple[Array, Array]:
    """Mean of D_{J_δ}(θ*, θ_k) over `seeds` runs, one a row of θ, with noisy gradients.

    τ_k = c/k, or constant where c is None.
    """
    d, lam = 6, 0.5
    A = torch.diag(torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4, 1.5], dtype=torch.float64))
    minimiser = torch.tensor([1.0, 0.0, -0.5, 0.0, 2.0, 0.0], dtype=torch.float64).expand(seeds, d)
    weight = nn.Parameter(torch.zeros(seeds, d, dtype=torch.float64))
    optimizer = tb.LinBreg([weight], lr=0.1, regularizer=tb.L1(), lam=lam)
    gen = seeded(1)
    at, found = [], []
    for k in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = 0.3 if c is None else c / k
        error = torch.randn(seeds, d, generator=gen, dtype=torch.float64)
        weight.grad = (weight.detach() - minimiser) @ (A @ A) + noise * error
        optimizer.step()
        if k in {int(10 ** (i / 8)) for i in range(8, 40)}:
            theta = weight.detach()
            p = optimizer.state[weight]["dual"] - theta
            at.append(k)
            found.append(
                float(tb.bregman_distance(tb.L1(), minimiser, theta, lam=lam, delta=1.0, subgradient=p)) / seeds
            )
    return np.array(at), np.array(found)


def test_rate_one_over_k_with_noisy_gradients():
    """τ_k = c/k: E D ≤ C/k. The slope of log D over log k is −1; with a constant step D stays at the noise."""
    at, found = averaged_distance(c=2.0, steps=3000, seeds=40, noise=1.0)
    late = at >= 30
    slope = np.polyfit(np.log(at[late]), np.log(found[late]), 1)[0]
    assert -1.3 < slope < -0.8
    assert (found[late] * at[late]).max() < 5 * (found[late] * at[late]).min()  # one C for all k

    at, found = averaged_distance(c=None, steps=3000, seeds=40, noise=1.0)
    late = at >= 30
    assert abs(np.polyfit(np.log(at[late]), np.log(found[late]), 1)[0]) < 0.2


# ---------------------------------------------------------------------- the distances themselves


REGULARISERS = {
    "L1": tb.L1(),
    "rows": tb.GroupL1("rows"),
    "index": tb.GroupL1(torch.arange(20).view(4, 5) % 6),
    "sparse group": tb.SparseGroupL1("columns", 0.4),
    "NuclearNorm": tb.NuclearNorm(),
    "NonNegativeL1": tb.NonNegativeL1(),
}
distances = pytest.mark.parametrize("name", REGULARISERS)


def pair(name: str, seed: int) -> tuple[tb.Regularizer, Tensor, Tensor]:
    reg = REGULARISERS[name]
    t, s = (reg.prox(1.5 * randn(4, 5, seed=k), 0.4) for k in (seed, seed + 100))
    return reg, t, s


@distances
@pytest.mark.parametrize("delta", [0.5, 3.0, math.inf])
def test_bregman_distance(name, delta):
    """Not negative, zero at equality, and for homogeneous J the closed form J(t) − ⟨p, t⟩ + ‖t − s‖²/(2δ)."""
    for seed in range(5):
        reg, t, s = pair(name, seed)
        lam, quadratic = 0.7, float((t - s).square().sum()) / (2 * delta)
        held = lam * reg.nearest_subgradient(s, randn(4, 5, seed=seed + 7))
        for p in (None, held):
            used = lam * reg.subgradient(s) if p is None else p
            found = tb.bregman_distance(reg, t, s, lam=lam, delta=delta, subgradient=p)
            assert found.shape == ()
            assert float(found) == pytest.approx(
                float(reg.value(t, lam)) - float((used * t).sum()) + quadratic, rel=1e-9, abs=1e-10
            )
            assert float(found) >= quadratic - 1e-10
            assert float(found) > 1e-3
            assert float(tb.bregman_distance(reg, s, s, lam=lam, delta=delta, subgradient=p)) == 0
        # what is no subgradient gives something else, and below zero for some t
        far = tb.bregman_distance(reg, 3 * s, s, lam=lam, subgradient=1.5 * used)
        assert float(far) < 0


@distances
def test_the_two_directions_add_up(name):
    for seed in range(5):
        reg, t, s = pair(name, seed)
        for delta in (0.5, math.inf):
            for near in (torch.zeros(4, 5, dtype=torch.float64), randn(4, 5, seed=seed + 7)):
                p_t, p_s = 0.7 * reg.nearest_subgradient(t, near), 0.7 * reg.nearest_subgradient(s, -near)
                there = tb.bregman_distance(reg, t, s, lam=0.7, delta=delta, subgradient=p_s)
                back = tb.bregman_distance(reg, s, t, lam=0.7, delta=delta, subgradient=p_t)
                both = tb.symmetric_bregman_distance(p_t + t / delta, p_s + s / delta, t, s)
                assert both.shape == ()
                assert float(there + back) == pytest.approx(float(both), rel=1e-9, abs=1e-10)
                assert float(both) == float(tb.symmetric_bregman_distance(p_s + s / delta, p_t + t / delta, s, t))
                assert float(both) > 0
        assert abs(float(there) - float(back)) > 1e-6  # it is no metric


def test_bregman_distance_by_hand():
    s, t = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([-1.0, 3.0, -2.0])
    # |t| sums to 6, |s| to 3, p = (1, 0, −1): ⟨p, t − s⟩ = −3 + 1 = −2
    assert float(tb.bregman_distance(tb.L1(), t, s)) == 6 - 3 + 2
    assert float(tb.bregman_distance(tb.L1(), t, s, lam=0.5)) == 2.5
    assert float(tb.bregman_distance(tb.L1(), t, s, delta=2.0)) == 5 + (9 + 9 + 1) / 4
    assert float(tb.bregman_distance(tb.L1(), t, s, subgradient=torch.tensor([1.0, 1.0, -1.0]))) == 5 - 3
    assert float(tb.bregman_distance(tb.L1(), 2 * s, s)) == 0  # same signs: no distance without the quadratic part
    assert float(tb.bregman_distance(tb.NonNegativeL1(), t, s.abs())) == math.inf


def test_mistakes():
    x = torch.ones(3)
    with pytest.raises(ValueError, match="one shape") as error:
        tb.bregman_distance(tb.L1(), x, torch.ones(4))
    assert "(3,)" in str(error.value)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            tb.bregman_distance(tb.L1(), x, x, delta=bad)
    for bad in (-1.0, math.nan, "x"):
        with pytest.raises(ValueError, match="lam"):
            tb.bregman_distance(tb.L1(), x, x, lam=bad)


def test_distances_record_no_gradient():
    x = nn.Parameter(torch.ones(3))
    assert not tb.bregman_distance(tb.L1(), x, 2 * x).requires_grad
    assert not tb.symmetric_bregman_distance(x, 2 * x, x, 2 * x).requires_grad
