"""Denoisers: what they get and should give, and that they can give a black background."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from torch_bregman.data import load
from torch_bregman.models import MODELS, build
from torch_bregman.train import fit
from torch_bregman.train.denoising import Denoising
from torch_bregman.train.recipe import Recipe


@pytest.fixture(params=[(1, 5, 4), (3, 5, 4), (6,)], ids=["grey", "colour", "array"])
def saved(request, tmp_path):
    """A data set in a file and the samples of each of its splits; channels differ in mean and spread."""
    random = np.random.default_rng(0)
    width = request.param[0]
    size = np.linspace(0.2, 1, width, dtype=np.float32).reshape(width, *(1,) * (len(request.param) - 1))
    x = size * random.random((60, *request.param), dtype=np.float32)
    path = tmp_path / "samples.npz"
    np.savez(path, **{f"x_{kind}": x for kind in ("train", "val", "test")}, **{
        f"y_{kind}": np.arange(60) % 2 for kind in ("train", "val", "test")
    })  # fmt: skip
    return path, torch.from_numpy(x)


def test_raw_undoes_the_normalisation(saved):
    path, x = saved
    data = load(str(path))
    assert not torch.allclose(data.validation.x, x, atol=0.1)
    torch.testing.assert_close(data.raw(data.validation.x), x)


def test_noise_is_measured_before_the_normalisation(saved):
    path, x = saved
    data = load(str(path))
    denoising = Denoising(data, 0.3)
    many = data.validation.x.repeat(50, *(1,) * len(data.shape))
    noise = data.raw(denoising.noisy(many, torch.Generator().manual_seed(0))) - data.raw(many)
    spread = noise.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(spread, torch.full_like(spread, 0.3), rtol=0.06, atol=0)
    torch.testing.assert_close(denoising.clean(data.validation.x), x)


class Grey(nn.Module):
    """A denoiser that always says 0.25."""

    task = "denoise"

    def __init__(self, shape, classes):
        super().__init__()
        self.shape = shape
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return 0.25 + 0 * self.layer(x.flatten(1)[:, :1]).view(-1, *(1,) * len(self.shape)).expand(-1, *self.shape)


def test_the_loss_is_that_of_the_samples_before_normalisation(saved, tmp_path, monkeypatch):
    path, x = saved
    monkeypatch.setitem(MODELS, "grey", Grey)
    recipe = Recipe(dataset=str(path), model="grey", optimizer="adam", epochs=1).check()
    fit(recipe, tmp_path / "run", quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["val_loss"] == pytest.approx(float((x - 0.25).square().mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["autoencoder", "skipencoder"])
def test_pixels_are_not_negative_and_arrays_may_be(name):
    torch.manual_seed(0)
    images = build(name, (2, 4, 3), 10)(torch.randn(50, 2, 4, 3))
    assert images.shape == (50, 2, 4, 3)
    assert images.min() == 0 < images.max()
    assert build(name, (9,), 10)(torch.randn(50, 9)).min() < 0


@pytest.mark.parametrize("model", ["autoencoder", "skipencoder"])
def test_images_with_negative_values_are_refused(tmp_path, model):
    x = np.random.default_rng(0).uniform(-1, 1, (40, 1, 4, 4)).astype(np.float32)
    path = tmp_path / "signed.npz"
    np.savez(path, x=x, y=np.arange(40) % 2)
    recipe = Recipe(dataset=str(path), model=model, optimizer="adam", epochs=1).check()
    with pytest.raises(ValueError, match=rf"'{model}' gives pixels.*go down to -0\.\d+.*pixels in \[0, 1\]"):
        fit(recipe, tmp_path / "run", quiet=True)
    np.savez(path, x=x.reshape(40, 16), y=np.arange(40) % 2)
    assert "test_loss" in fit(recipe, tmp_path / "array", quiet=True)
