"""Where a run starts: the variance of the first layer, and the mean image of a denoiser."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from torch_bregman import sparse_init_
from torch_bregman.data import load
from torch_bregman.layers import weight_layers
from torch_bregman.models import build
from torch_bregman.train import fit
from torch_bregman.train.denoising import start_at_mean
from torch_bregman.train.recipe import Recipe
from torch_bregman.train.start import start_sparse

GROUPED = Recipe(regularizer="group-l1", lam=0.1, initial_density=0.25)


def started(recipe: Recipe, model: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    net = build(model, shape, 10)
    start_sparse(recipe.check(), net)
    return [weight.detach() for _, _, weight in weight_layers(net)]


def std_of_live(weight: torch.Tensor) -> float:
    return float(weight[weight != 0].square().mean().sqrt())


def test_rows_of_the_first_layer_are_not_scaled_for_dead_pixels():
    first, second, _ = started(replace(GROUPED, groups="rows"), "mlp", (1, 28, 28))
    assert std_of_live(first) == pytest.approx(math.sqrt(2 / 784), rel=0.03)
    assert std_of_live(second) == pytest.approx(math.sqrt(2 / (200 * 0.25)), rel=0.06)


@pytest.mark.parametrize(("channels", "share"), [(1, 1.0), (3, None)])
def test_kernels_of_the_first_layer_count_the_channels_that_a_live_filter_sees(channels, share):
    first, second, *_ = started(replace(GROUPED, groups="kernels"), "convnet", (channels, 28, 28))
    alive = first.flatten(2).any(2)
    if share is None:
        share = float(alive[alive.any(1)].float().mean())
        assert 1 / 3 < share < 1
    assert std_of_live(first) == pytest.approx(math.sqrt(2 / (channels * 25 * share)), rel=0.12)
    assert std_of_live(second) == pytest.approx(math.sqrt(2 / (64 * 25 * 0.25)), rel=0.03)


def test_single_entries_start_as_sparse_init_draws_them():
    recipe = Recipe(lam=0.1, seed=3).check()
    net, twin = (build("convnet", (1, 28, 28), 10) for _ in range(2))
    start_sparse(recipe, net)
    generator = torch.Generator().manual_seed(3)
    for linear in (True, False):
        for _, module, weight in weight_layers(twin):
            if (weight.dim() == 2) == linear:
                sparse_init_(module, 0.01, None, generator)
    for made, drawn in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(made, drawn)


def test_a_denoiser_starts_with_a_small_output():
    weights = started(replace(GROUPED, groups="rows"), "autoencoder", (1, 10, 10))
    assert std_of_live(weights[-1]) == pytest.approx(0.1 * std_of_live(weights[-2]), rel=0.1)


@pytest.mark.parametrize("model", ["autoencoder", "skipencoder"])
def test_the_output_starts_at_the_mean_image(model):
    net = build(model, (1, 6, 6), 10)
    x = torch.randn(20, 1, 6, 6)
    start_at_mean(net, x)
    *_, last = weight_layers(net)
    torch.testing.assert_close(last.module.bias.detach(), x.mean(0).flatten())


def test_an_output_of_another_size_or_without_a_bias_is_left_alone():
    x = torch.randn(20, 1, 6, 6)
    for last in (torch.nn.Linear(36, 10), torch.nn.Linear(36, 36, bias=False)):
        net = torch.nn.Sequential(torch.nn.Flatten(), last)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        start_at_mean(net, x)
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name])


def test_a_network_without_layers_to_start_is_left_to_the_optimizer():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(36))
    start_sparse(GROUPED.check(), net)
    start_at_mean(net, torch.randn(20, 1, 6, 6))
    assert torch.equal(net[1].weight, torch.ones(36))


@pytest.mark.parametrize("optimizer", ["adam", "adabreg"])
def test_the_first_scores_of_a_denoiser_are_about_those_of_the_mean_image(tmp_path, optimizer):
    recipe = Recipe(
        dataset="digits", model="autoencoder", optimizer=optimizer, lam=None if optimizer == "adam" else 0.07,
        regularizer="group-l1", groups="rows", initial_density=0.1, lr=1e-12, epochs=1,
    ).check()  # fmt: skip
    fit(recipe, tmp_path / "run", quiet=True)
    data = load("digits")
    clean = data.raw(data.validation.x)
    of_mean = float(F.mse_loss(data.raw(data.train.x).mean(0, keepdim=True).expand_as(clean), clean))
    first = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["val_loss"] == pytest.approx(of_mean, rel=0.1)


def test_no_filter_in_front_of_a_norm_starts_without_inputs():
    """It would stay dead: the stem of a ResNet-18 ended with 14 of 64 filters."""
    for weight in started(Recipe(density=0.01), "resnet18", (3, 32, 32)):
        assert (weight != 0).flatten(1).any(1).all()
    for weight in started(Recipe(density=0.01), "convnet", (1, 28, 28)):  # has biases and no norm
        assert int((weight != 0).sum()) == max(1, round(0.005 * weight.numel()))
