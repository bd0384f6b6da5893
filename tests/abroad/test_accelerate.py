"""accelerate: prepared models and optimizers, clipping, accumulation, and its saved states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_bregman as tb

pytestmark = pytest.mark.abroad
accelerate = pytest.importorskip("accelerate", reason="needs the extra `integrations`")

STEPS = 40


@pytest.fixture(autouse=True)
def _apart():
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(640, 30, generator=generator).double(), torch.randn(30, 10, generator=generator).double()
    return list(zip(x.split(8), (x @ w).argmax(1).split(8), strict=True))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 10))
    tb.sparse_init_(model, 0.02, generator=torch.Generator().manual_seed(0))
    return model.double()  # a norm may be added up in another order, and Adam divides by what is small


def run(
    accelerator: Any, *, clip: float | None, multilevel: int | None, folder: Path | None = None, stop: int | None = None
) -> tuple[nn.Module, tb.TargetDensity]:
    """The loop of accelerate's own documentation, with the controls where the optimizer has stepped."""
    model = network()
    model, optimizer = accelerator.prepare(model, tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=1e-2))
    first = 0
    if stop is not None and stop < STEPS and folder is not None and folder.exists():
        accelerator.load_state(str(folder))
        first = stop
    control = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
    levels = tb.Multilevel(model, optimizer, coarse_steps=multilevel) if multilevel else None
    every = accelerator.gradient_accumulation_steps
    for i, (x, y) in enumerate(data()[first * every : STEPS * every], first * every):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients and clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                control.step()
                if levels is not None:
                    levels.step()
            optimizer.zero_grad()
        if folder is not None and not folder.exists() and stop == (i + 1) // every:
            accelerator.save_state(str(folder))
            break
    return model, control


@pytest.mark.parametrize("multilevel", [None, 3])
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.1, 1), (0.1, 2)])
def test_the_same_weights_as_the_plain_loop(clip, accumulate, multilevel):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, control = run(accelerator, clip=clip, multilevel=multilevel)

    plain = network()
    optimizer = tb.AdaBreg(tb.param_groups(plain, tb.L1()), lr=1e-2)
    also = tb.TargetDensity(optimizer, 0.05, total_steps=STEPS)
    levels = tb.Multilevel(plain, optimizer, coarse_steps=multilevel) if multilevel else None
    batches = data()
    for i in range(STEPS):
        optimizer.zero_grad()
        for x, y in batches[i * accumulate : (i + 1) * accumulate]:
            (nn.functional.cross_entropy(plain(x), y) / accumulate).backward()
        if clip is not None:
            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            nn.utils.clip_grad_norm_(held, clip)
        optimizer.step()
        also.step()
        if levels is not None:
            levels.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert tb.density(model) == control.density == pytest.approx(0.05, abs=1e-3)


def test_resumed_is_uninterrupted(tmp_path):
    """save_state() holds model, optimizer and random numbers; the control is made anew."""
    straight, _ = run(accelerate.Accelerator(cpu=True), clip=None, multilevel=None)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    run(accelerate.Accelerator(cpu=True), clip=None, multilevel=None, folder=tmp_path / "half", stop=17)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    again, control = run(
        accelerate.Accelerator(cpu=True), clip=None, multilevel=None, folder=tmp_path / "half", stop=17
    )
    for ours, theirs in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert tb.density(again) == control.density == pytest.approx(0.05, abs=1e-3)
