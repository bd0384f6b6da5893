"""The structural similarity of denoised images, on pixels in [0, 1]."""

import json
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from torch_bregman.data import load
from torch_bregman.models import build
from torch_bregman.train import evaluation, fit, loop
from torch_bregman.train.recipe import Recipe
from torch_bregman.train.ssim import similarity_on
from torch_bregman.train.weights import load_model


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def pictures(request, tmp_path):
    """A data set of 9×8 pictures in [0, 1], and the pixels of its training split."""
    random = np.random.default_rng(0)
    x = random.random((40, request.param, 9, 8), dtype=np.float32)
    np.savez(tmp_path / "pictures.npz", x=x, y=np.arange(40) % 2)
    return load(str(tmp_path / "pictures.npz"))


def pixels(x, data):
    shape = (-1, 1, 1)
    return (x.numpy() * np.reshape(data.std, shape) + np.reshape(data.mean, shape)).astype(np.float32)


def clip(x):
    return np.clip(x.numpy(), 0, 1)


def test_the_same_image_has_similarity_one(pictures):
    x = pictures.raw(pictures.train.x[:5])
    assert similarity_on(pictures)(x, x) == pytest.approx([1.0] * 5)


def test_it_is_that_of_scikit_image_on_pixels(pictures):
    torch.manual_seed(0)
    clean = pictures.raw(pictures.train.x[:4])
    made = clean + torch.randn_like(clean)  # far out of [0, 1] in places
    assert made.min() < 0 < 1 < made.max()
    got = similarity_on(pictures)(made, clean)
    for value, a, b in zip(got, made, clean, strict=True):
        direct = structural_similarity(clip(a), clip(b), data_range=1.0, channel_axis=0)
        assert value == pytest.approx(direct, abs=1e-5)
        if len(a) == 1:
            grey = structural_similarity(clip(a)[0], clip(b)[0], data_range=1.0)
            assert value == pytest.approx(grey, abs=1e-5)
    assert got != pytest.approx([1.0] * 4, abs=0.05)
    assert similarity_on(pictures)(made.bfloat16(), clean) == pytest.approx(got, abs=0.02)


def test_a_run_reports_it_for_validation_and_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 100)
    monkeypatch.setattr(loop, "SSIM_IMAGES", 150)
    end = fit(Recipe(dataset="digits", model="autoencoder", optimizer="adam", epochs=1).check(), tmp_path, quiet=True)
    data = load("digits")
    model = build("autoencoder", data.shape, 10).eval()
    load_model(tmp_path / "best.safetensors", model)
    scale = 0.05 / torch.tensor(data.std).view(-1, 1, 1)
    expected = {}
    for key, split, count in (("val_ssim", data.validation, 150), ("test_ssim", data.test, len(data.test))):
        noise = torch.Generator().manual_seed(0)
        values = []
        for x in split.x.split(100):
            with torch.no_grad():
                made = model(x + scale * torch.randn(x.shape, generator=noise))
            pairs = zip(clip(made), pixels(x, data), strict=True)
            values += [structural_similarity(a[0], b[0], data_range=1.0) for a, b in pairs]
        assert len(values) > 150
        expected[key] = np.mean(values[:count])
    assert end["val_ssim"] == pytest.approx(expected["val_ssim"], abs=1e-4)
    assert end["test_ssim"] == pytest.approx(expected["test_ssim"], abs=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_ssim"] for row in rows[-2:]] == [end["val_ssim"]] * 2


def test_without_scikit_image_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    recipe = Recipe(dataset="digits", model="autoencoder", optimizer="adam", epochs=1, limit=100).check()
    end = fit(recipe, tmp_path, quiet=True)
    assert not any("ssim" in key for key in end)
    assert "test_loss" in end


def test_classifiers_and_what_is_no_image_have_none(tmp_path):
    end = fit(Recipe(dataset="digits", model="mlp", optimizer="adam", epochs=1, limit=100).check(), tmp_path / "run",
              quiet=True)  # fmt: skip
    assert not any("ssim" in key for key in end)
    random = np.random.default_rng(0)
    for shape in ((6, 9), (9,)):
        x = random.random((20, *(1,) * (len(shape) - 1), *shape), dtype=np.float32)
        np.savez(tmp_path / "small.npz", x=x, y=np.arange(20) % 2)
        assert similarity_on(load(str(tmp_path / "small.npz"))) is None
