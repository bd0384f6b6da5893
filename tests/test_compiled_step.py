"""The step for GPUs: its mathematics here, its compilation where a compiler or a GPU is."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import torch_bregman as tb
from torch_bregman.optim import compiled

pytestmark = pytest.mark.filterwarnings("ignore:.*more than half dense")  # a single number is dense or nothing

CASES: list[tuple[type, dict[str, Any]]] = [
    (tb.LinBreg, {}),
    (tb.LinBreg, {"momentum": 0.9}),
    (tb.LinBreg, {"momentum": 0.9, "momentum_rule": "sgd"}),
    (tb.LinBreg, {"momentum": 0.9, "momentum_rule": "sgd", "nesterov": True, "weight_decay": 0.01}),
    (tb.LinBreg, {"delta": 0.5, "maximize": True}),
    (tb.AdaBreg, {}),
    (tb.AdaBreg, {"weight_decay": 0.1, "eps": 1e-4}),
    (tb.ProxSGD, {}),
    (tb.ProxSGD, {"momentum": 0.9, "nesterov": True}),
]


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
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send tensors of the CPU through the step for GPUs."""
    monkeypatch.setattr(compiled, "supports", lambda p: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("regularizer", [None, tb.L1(), tb.NonNegativeL1()], ids=str)
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_the_equations_are_those_of_the_readable_step(
    cls: type, options: dict[str, Any], regularizer: Any, dtype: torch.dtype, pretend: None, monkeypatch: Any
) -> None:
    calls = []

    def uncompiled(rule: str, primal: bool) -> Any:
        calls.append(rule)
        return compiled.step(rule, primal)

    monkeypatch.setattr(compiled, "compiled", functools.cache(uncompiled))
    agree(cls, options, regularizer, "cpu", dtype)
    assert calls


def test_a_group_prox_takes_the_plain_step(pretend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "compiled", lambda *_: pytest.fail("a group norm is no elementwise pass"))
    p = torch.nn.Parameter(torch.zeros(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = tb.LinBreg([p], lr=1.0, lam=0.1, regularizer=tb.GroupL1("rows"), fused=True)
    optimizer.step()
    torch.testing.assert_close(p, (-torch.ones(4, 3) * (1 - 0.1)).requires_grad_())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_one_compilation_serves_all_shapes_and_numbers(pretend: None) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    compiled.compiled.cache_clear()
    agree(tb.LinBreg, {}, tb.L1(), "cpu", torch.float32)
    before = counters["stats"]["unique_graphs"]
    run(tb.LinBreg, {"delta": 0.7}, tb.L1(), "cpu", torch.float32, fused=True)
    p = torch.nn.Parameter(torch.zeros(123, 17))
    p.grad = torch.ones_like(p)
    tb.LinBreg([p], lr=0.3, lam=0.01, regularizer=tb.L1(), fused=True).step()
    assert counters["stats"]["unique_graphs"] == before
    agree(tb.AdaBreg, {}, tb.L1(), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cls", "options"), CASES)
def test_on_a_gpu(cls: type, options: dict[str, Any], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    agree(cls, options, tb.L1(), "cuda", dtype)
