"""Passes that are recorded once and replayed (train/graphs.py)."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import torch_bregman as tb
from torch_bregman.train import Recipe, fit
from torch_bregman.train.errors import Stopped
from torch_bregman.train.graphs import Replayed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A recorder for the CPU, which runs what it gets once, as that of CUDA does, and notes what it was asked for."""
    asked: list[Any] = []

    def record(module: nn.Module, sample: tuple[Tensor], allow_unused_input: bool) -> Any:
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        asked.append(sample[0])
        module(*sample)
        return lambda x: asked.append(x) or module(x)

    def random_state(device: Any) -> Tensor:
        return torch.get_rng_state()

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "get_rng_state", random_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: torch.set_rng_state(state))
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    return asked


def test_full_batches_in_training_are_replayed_and_nothing_else(recorder: list[Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    twin = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    twin.load_state_dict(model.state_dict())
    call = Replayed(model, batch_size=8)
    torch.manual_seed(1)
    batches = [torch.randn(n, 3) for n in (8, 8, 5, 8)]
    results = []
    for network in (call, twin):
        torch.manual_seed(2)
        results.append([network(x) for x in batches])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)  # recording has drawn no random number and moved no running mean
    for one, two in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, two)
    assert [len(x) for x in recorder] == [8] * 4  # recorded once, three times replayed
    model.eval()
    call(batches[0])
    model.train()
    with torch.no_grad():
        call(batches[0])
    assert len(recorder) == 4


def test_multilevel_training_refuses() -> None:
    with pytest.raises(ValueError, match=r"`cuda_graphs`: True; multilevel"):
        Recipe(multilevel=True, cuda_graphs=True).check()


def test_without_a_gpu_it_changes_nothing(tmp_path: Path) -> None:
    weights = []
    for graphs in (False, True):
        recipe = Recipe(dataset="digits", epochs=1, limit=256, device="cpu", cuda_graphs=graphs).check()
        fit(recipe, tmp_path / str(graphs), quiet=True)
        weights.append(load_file(tmp_path / str(graphs) / "last.safetensors"))
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])


# ---------------------------------------------------------------------- on a GPU


def images(folder: Path, **options: Any) -> Recipe:
    """A small run on random images, whose last batch is not full."""
    generator = np.random.default_rng(0)
    path = folder / "images.npz"
    y = generator.integers(0, 4, 400)
    x = generator.integers(0, 128, (400, 3, 16, 16)) + 32 * y[:, None, None, None]
    np.savez(path, x=x.astype(np.uint8), y=y)
    fixed = {
        "model": "torch_bregman.models.resnet:narrow_resnet", "augment": "crop-flip", "epochs": 3, "batch_size": 64,
        "device": "cuda", "lr": 3e-3,
    }  # fmt: skip
    return Recipe(dataset=str(path), **fixed | options).check()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler")  # the first steps in fp16 are left out
@pytest.mark.parametrize("precision", ["32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adabreg", "linbreg", "sgd", "gmp", "rigl", "lasso"])
def test_a_replayed_run_is_the_run(optimizer: str, precision: str, tmp_path: Path) -> None:
    ends = []
    for graphs in (False, True):
        run = tmp_path / str(graphs)
        recipe = images(tmp_path, optimizer=optimizer, precision=precision, cuda_graphs=graphs)
        ends.append(fit(recipe, run, quiet=True))
    rows = [
        [json.loads(line) for line in (tmp_path / str(graphs) / "metrics.jsonl").read_text().splitlines()]
        for graphs in (False, True)
    ]
    assert rows[0][1]["train_loss"] == pytest.approx(rows[1][1]["train_loss"], rel=1e-3 if precision == "32" else 2e-2)
    assert ends[0]["density"] == ends[1]["density"]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "linbreg", "momentum": 0.9, "lr": 0.05}, {"precision": "bf16"}], ids=str
)
def test_a_replayed_run_that_is_stopped_goes_on_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, stop_after: Any
) -> None:
    recipe = images(tmp_path, cuda_graphs=True, **options)
    fit(recipe, tmp_path / "whole", quiet=True)
    stop_after(tb.TargetDensity, 3, 9)
    for _ in range(2):
        with pytest.raises(Stopped, match="Stopped at epoch"):
            fit(recipe, tmp_path / "parts", quiet=True)
    fit(recipe, tmp_path / "parts", quiet=True)
    whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    for name, weight in whole.items():
        assert torch.equal(weight, parts[name]), name
