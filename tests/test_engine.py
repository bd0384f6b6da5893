"""What training loops do with PyTorch's engine: compile, autocast, scale losses, accumulate, checkpoint, clip."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

import torch_bregman as tb

STEPS, DENSITY = 24, 0.2

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "linbreg": lambda groups: tb.LinBreg(groups, lr=0.1),
    "momentum": lambda groups: tb.LinBreg(groups, lr=0.1, momentum=0.9),
    "adabreg": lambda groups: tb.AdaBreg(groups, lr=0.01),
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


class Net(nn.Module):
    """Two hidden layers with dropout between them; `checkpointed` computes them again on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 15), nn.Tanh())
        self.head = nn.Linear(15, 3)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))


class Run:
    """A network, its optimizer and the controller of its density."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.model = tb.sparse_init_(Net(), 0.3).to(dtype)
        self.optimizer = OPTIMIZERS[name](tb.param_groups(self.model, tb.L1(), lam=0.05))
        self.control = tb.TargetDensity(self.optimizer, DENSITY, total_steps=STEPS)
        self.weights = [p for p in self.model.parameters() if p.dim() > 1]

    def loss(self, i: int, part: slice = slice(None)) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        x, y = torch.randn(12, 12, generator=generator), torch.randint(0, 3, (12,), generator=generator)
        x = x.to(self.weights[0].dtype)
        return F.cross_entropy(self.model(x[part]), y[part])

    def everything(self) -> dict[str, Any]:
        return copy.deepcopy({part: getattr(self, part).state_dict() for part in ("model", "optimizer", "control")})

    def check(self) -> None:
        """θ is the prox of v, v has float32 or better, and the density is what was asked for."""
        for p in self.weights:
            dual, lam = self.optimizer.state[p]["dual"], self.optimizer.param_groups[0]["lam"]
            assert dual.dtype in (torch.float32, torch.float64)
            assert torch.equal(p, tb.L1().prox(dual, lam).to(p.dtype))
        assert tb.density(self.model) == pytest.approx(DENSITY, abs=3e-3)


def same(a: Any, b: Any, **tolerance: float) -> None:
    """Tensors and numbers within the tolerance, to the last bit without one; all else equal."""
    (ones, shape), (others, other_shape) = tree_flatten(a), tree_flatten(b)
    assert shape == other_shape
    for x, y in zip(ones, others, strict=True):
        if isinstance(x, Tensor | float):
            torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))
        else:
            assert x == y


def train(run: Run, steps: range = range(STEPS), step: Callable[[int], None] | None = None) -> None:
    def plain(i: int) -> None:
        run.optimizer.zero_grad()
        run.loss(i).backward()
        run.optimizer.step()

    for i in steps:
        torch.manual_seed(i)  # for dropout
        (step or plain)(i)
        run.control.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch itself
@pytest.mark.parametrize("what", ["model", "optimizer.step", "both, as one function"])
@each
def test_a_compiled_step_is_the_same_step(name: str, what: str) -> None:
    """By Dynamo alone: the graphs that it finds are run as they are, without a C++ compiler."""
    torch._dynamo.reset()
    plain, ours = Run(name), Run(name)
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(i: int) -> None:
        ours.optimizer.zero_grad()
        ours.loss(i).backward()
        ours.optimizer.step()

    if what == "model":
        ours.model.compile(backend=backend)
    elif what == "optimizer.step":
        ours.optimizer.step = torch.compile(ours.optimizer.step, backend=backend)
    train(plain)
    train(ours, step=torch.compile(step, backend=backend) if what.startswith("both") else step)
    same(plain.everything(), ours.everything())
    ours.check()
    assert graphs <= 8  # the step is left as it is, and does not become a graph for each line
    assert graphs > 0 or what == "optimizer.step"


@pytest.mark.slow  # it compiles C++
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@each
def test_a_network_compiled_to_machine_code_trains(name: str) -> None:
    torch._dynamo.reset()
    plain, ours = Run(name), Run(name)
    for run in (plain, ours):
        run.model.body[2].p = 0.0  # its random numbers are others there
    ours.model.compile()
    train(plain)
    train(ours)
    same(plain.everything(), ours.everything(), rtol=1e-3, atol=1e-4)
    ours.check()


@each
def test_bfloat16_autocast_leaves_weights_and_v_in_float32(name: str) -> None:
    plain, ours = Run(name), Run(name)
    kinds: list[torch.dtype] = []
    ours.model.head.register_forward_hook(lambda module, args, y: kinds.append(y.dtype))

    def step(i: int) -> None:
        ours.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = ours.loss(i)
        loss.backward()
        ours.optimizer.step()

    train(plain)
    train(ours, step=step)
    assert set(kinds) == {torch.bfloat16}
    ours.check()
    for p, q in zip(plain.weights, ours.weights, strict=True):
        assert q.dtype == torch.float32
        assert not torch.equal(p, q)
        # bfloat16 has 8 bits: the two runs stay together, but for what is near the threshold
        assert float((p - q).detach().norm() / p.detach().norm()) < 0.2


@each
def test_bfloat16_weights(name: str) -> None:
    run = Run(name, torch.bfloat16)
    before = float(run.loss(0).detach())
    train(run)
    run.check()
    assert all(run.optimizer.state[p]["dual"].dtype == torch.float32 for p in run.weights)
    assert float(run.loss(0).detach()) < before


@each
def test_an_overflow_in_half_precision_leaves_everything_as_it_is(name: str) -> None:
    """float16 autocast and a GradScaler: a step that it skips moves neither θ nor v; a controller counts it."""
    run, calm = Run(name), Run(name)
    skipped: list[int] = []

    def steps_of(some: Run, scale: float) -> Callable[[int], None]:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)

        def step(i: int) -> None:
            some.optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = some.loss(i)
            scaler.scale(loss).backward()
            before, scale = some.everything(), scaler.get_scale()
            scaler.step(some.optimizer)
            scaler.update()
            if scaler.get_scale() < scale:
                skipped.append(i)
                same(before, some.everything())
            else:
                assert any(not torch.equal(p, before["model"][k]) for k, p in some.model.state_dict().items())

        return step

    train(run, step=steps_of(run, 2.0**24))  # more than float16 holds
    assert 0 in skipped
    assert len(skipped) < STEPS // 2
    run.check()
    assert run.control.steps == STEPS
    count = len(skipped)
    train(calm, step=steps_of(calm, 2.0**8))
    assert len(skipped) == count
    calm.check()


@each
def test_micro_batches_are_one_batch(name: str) -> None:
    whole, parts = Run(name, torch.float64), Run(name, torch.float64)

    def step(i: int) -> None:
        parts.optimizer.zero_grad()
        for first in range(0, 12, 3):
            (parts.loss(i, slice(first, first + 3)) / 4).backward()
        parts.optimizer.step()

    for run in (whole, parts):
        run.model.body[2].p = 0.0
    train(whole)
    train(parts, step=step)
    for p, q in zip(whole.weights, parts.weights, strict=True):
        assert torch.equal(p != 0, q != 0)
    same(whole.everything(), parts.everything(), rtol=1e-9, atol=1e-11)
    parts.check()


@each
def test_activation_checkpointing_changes_no_bit(name: str) -> None:
    plain, ours = Run(name), Run(name)
    ours.model.checkpointed = True
    passes = [0, 0]
    for i, run in enumerate((plain, ours)):
        run.model.body[0].register_forward_hook(lambda *_, i=i: operator.setitem(passes, i, passes[i] + 1))
    train(plain)
    train(ours)
    assert passes == [STEPS, 2 * STEPS]
    same(plain.everything(), ours.everything())


@pytest.mark.parametrize("levels", [False, True], ids=["plain", "coarse phase"])
@each
def test_v_moves_by_the_clipped_gradient(name: str, levels: bool) -> None:
    """As far as the plain gradient times the factor of the clipping moves it."""
    limit = 0.05
    runs = [Run(name), Run(name)]
    if levels:
        phases = [tb.Multilevel(run.model, run.optimizer, coarse_steps=100, fine_steps=1) for run in runs]
        for run, phase in zip(runs, phases, strict=True):
            train(run, range(1))
            phase.step()
            assert phase.restricted
    for i in range(1, 5):
        norms = []
        for clipped, run in zip((True, False), runs, strict=True):
            torch.manual_seed(i)
            run.optimizer.zero_grad()
            run.loss(i).backward()
            held = [p for group in run.optimizer.param_groups for p in group["params"]]
            norm = torch.cat([p.grad.flatten() for p in held]).norm()
            before = [run.optimizer.state[p]["dual"].clone() for p in held] if i > 1 else None
            if clipped:
                assert float(nn.utils.clip_grad_norm_(held, limit)) == pytest.approx(float(norm))
            else:
                for p in held:
                    p.grad.mul_(limit / (norm + 1e-6))
            assert norm > limit
            run.optimizer.step()
            if before is not None and name == "linbreg":
                moved = [run.optimizer.state[p]["dual"] - v for p, v in zip(held, before, strict=True)]
                norms.append(float(torch.cat([m.flatten() for m in moved]).norm()))
        assert norms == pytest.approx([0.1 * limit] * len(norms), rel=1e-2)
    for p, q in zip(*(run.model.parameters() for run in runs), strict=True):
        same(p, q, rtol=1e-5, atol=1e-7)
