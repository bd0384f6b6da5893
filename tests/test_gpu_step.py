"""The step for GPUs: its mathematics here, in Triton's interpreter, its speed where a GPU is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ENTRYWISE, FLOATS, RULES, pairwise

import torch_bregman as tb
from torch_bregman.optim.onepass import gpu

pytestmark = pytest.mark.filterwarnings("ignore:.*more than half dense")  # a single number is dense or nothing

CASES: dict[str, tuple[type, dict[str, Any]]] = {
    **RULES,
    "linbreg-nesterov": (tb.LinBreg, {**RULES["linbreg-nesterov"][1], "weight_decay": 0.01}),
    "linbreg-maximize": (tb.LinBreg, {"delta": 0.5, "maximize": True}),
    "adabreg-eps": (tb.AdaBreg, {"weight_decay": 0.1, "eps": 1e-4}),
}


def weights(device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((40, 30), (7,), (8, 4, 3, 3), ()):
        w = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.2)
        made.append(torch.nn.Parameter(w.to(device, dtype)))
    made[2].data = made[2].data.contiguous(memory_format=torch.channels_last)
    return made


def run(cls: type, options: dict[str, Any], regularizer: Any, device: str, dtype: torch.dtype, **way: Any) -> Any:
    params = weights(device, dtype)
    optimizer = cls(params, lr=0.05, lam=0.1, regularizer=regularizer, **options, **way)
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        optimizer.step()
        if step == 2:
            optimizer.param_groups[0].update(lam=0.2, lr=0.02)
        if step == 4:
            with torch.no_grad():
                params[0].mul_(1.5)
    return params, optimizer


def agree(cls: type, options: dict[str, Any], regularizer: Any, device: str, dtype: torch.dtype) -> None:
    fused, _ = run(cls, options, regularizer, device, dtype, fused=True)
    plain, _ = run(cls, options, regularizer, device, dtype, foreach=False)
    for a, b in zip(fused, plain, strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(a != 0, b != 0)
    assert any((p == 0).any() for p in fused) or regularizer is None


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Send tensors of the CPU through the step for GPUs, in Triton's interpreter; the rules that ran."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when the kernel is made
    monkeypatch.delitem(sys.modules, "torch_bregman.kernels.gpu", raising=False)
    monkeypatch.setattr(gpu, "supports", gpu.without_gaps)
    ran: list[str] = []
    original = gpu.GpuPlan.run

    def run(plan: gpu.GpuPlan, rule: str, *rest: Any, **more: Any) -> None:
        ran.append(rule)
        original(plan, rule, *rest, **more)

    monkeypatch.setattr(gpu.GpuPlan, "run", run)
    return ran


@pairwise({"cls,options": CASES, "make": ENTRYWISE, "dtype": FLOATS})  # of bfloat16 the interpreter cuts bits off
def test_the_equations_are_those_of_the_readable_step(
    cls: type, options: dict[str, Any], make: Callable[[], Any], dtype: torch.dtype, pretend: list[str]
) -> None:
    agree(cls, options, make(), "cpu", dtype)
    assert len(pretend) == 8


def test_several_blocks_and_dtypes_in_one_group(pretend: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        sizes, dtypes = (1, 1024, 1025, 5000, 0, 3), (torch.float32, torch.float64) * 3
        generator.manual_seed(0)
        params = [torch.nn.Parameter(torch.zeros(n, dtype=d)) for n, d in zip(sizes, dtypes, strict=True)]
        optimizer = tb.AdaBreg(params, lr=0.3, lam=0.5, regularizer=tb.L1(), **way)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        results.append(params)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert torch.equal(one != 0, two != 0)
    assert pretend == ["ADAM"] * 4


def test_a_new_lambda_is_written_at_once(pretend: list[str]) -> None:
    results = []
    for way in ({"fused": True}, {"foreach": False}):
        generator = torch.Generator().manual_seed(1)
        p = torch.nn.Parameter(torch.zeros(50, 40))
        optimizer = tb.LinBreg([p], lr=1.0, lam=0.5, regularizer=tb.L1(), **way)
        for lam in (1.0, 0.3, 2.0):
            p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            optimizer.param_groups[0]["lam"] = lam
            optimizer.refresh()
        results.append((p.detach(), optimizer.state[p]["dual"]))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    assert torch.equal(results[0][0] != 0, results[1][0] != 0)
    assert pretend == ["PLAIN", "HOLD"] * 3


def test_what_is_no_number_stays_none(pretend: list[str]) -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = tb.AdaBreg([p], lr=0.1, lam=0.01, regularizer=tb.L1(), fused=True)
    p.grad = torch.tensor([1.0, float("nan"), -1.0])
    optimizer.step()
    p.grad = torch.ones(3)
    optimizer.step()
    assert p.isnan().tolist() == [False, True, False]


def test_a_group_prox_takes_the_plain_step(pretend: list[str]) -> None:
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = tb.LinBreg([p], lr=1.0, lam=0.1, regularizer=tb.GroupL1("rows"), fused=True)
    optimizer.step()
    torch.testing.assert_close(p, (-torch.ones(4, 3) * (1 - 0.1)).requires_grad_())
    assert not pretend


def test_a_state_saved_by_one_way_goes_on_by_the_other(pretend: list[str]) -> None:
    def make(**way: Any) -> tuple[torch.nn.Parameter, Any]:
        p = torch.nn.Parameter(torch.zeros(6, 5))
        return p, tb.AdaBreg([p], lr=0.1, lam=0.15, regularizer=tb.L1(), **way)

    grads = torch.randn(6, 6, 5, generator=torch.Generator().manual_seed(2))
    straight, one = make(foreach=False)
    for g in grads:
        straight.grad = g
        one.step()
    p, optimizer = make(fused=True)
    for g in grads[:3]:
        p.grad = g
        optimizer.step()
    q, other = make(foreach=False)
    other.load_state_dict(optimizer.state_dict())
    other.param_groups[0].update(fused=None, foreach=False)
    with torch.no_grad():
        q.copy_(p)
    for g in grads[3:]:
        q.grad = g
        other.step()
    torch.testing.assert_close(q, straight)
    assert pretend == ["ADAM"] * 3


@pytest.mark.gpu
@pairwise({"cls,options": CASES, "dtype": [torch.float32, torch.bfloat16]})
def test_on_a_gpu(cls: type, options: dict[str, Any], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    agree(cls, options, tb.L1(), "cuda", dtype)
