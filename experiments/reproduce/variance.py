"""How the sparse start carries signals through a deep network: variances per layer, nothing is trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from torch_bregman import sparse_init_
from torch_bregman.choices import choose
from torch_bregman.density import density as density_of

VARIANCE_OPTIONS = ("nonlinearity", "correction", "density", "depth", "width", "samples")


def variance_settings(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `variances`, filled and checked."""
    settings: dict[str, Any] = {
        "nonlinearity": "relu", "correction": True, "density": 0.01, "depth": 20, "width": 1000, "samples": 256,
    } | options  # fmt: skip
    choose("nonlinearity", settings["nonlinearity"], ("relu", "tanh"))
    if type(settings["correction"]) is not bool:
        raise ValueError(f"Invalid `correction`: {settings['correction']!r}; expected true or false.")
    for name, low in (("depth", 2), ("width", 1), ("samples", 1)):
        if type(settings[name]) is not int or settings[name] < low:
            raise ValueError(f"Invalid `{name}`: {settings[name]!r}; expected a whole number of at least {low}.")
    return settings


def variances(options: dict[str, Any], seed: int) -> tuple[list[float], list[float], float]:
    """How the sparse start carries signals through `depth` Linear layers of `width` units without biases.

    Returns (E[z²] of the pre-activations z of each layer for standard normal inputs, E[(∂L/∂z)²] of each layer for a
    standard normal gradient at the output, density). With the correction the weights have variance α/r, else α.
    """
    settings = variance_settings(options)
    generator = torch.Generator().manual_seed(seed)
    width = settings["width"]
    layers = [nn.Linear(width, width, bias=False) for _ in range(settings["depth"])]
    model = nn.Sequential(*layers)
    sparse_init_(model, settings["density"], generator=generator, nonlinearity=settings["nonlinearity"])
    model.double()  # without the correction the squares soon leave the range of float32
    if not settings["correction"]:
        with torch.no_grad():
            for layer in layers:
                layer.weight.mul_(math.sqrt(density_of(layer)))
    activation = torch.relu if settings["nonlinearity"] == "relu" else torch.tanh
    x = torch.randn(settings["samples"], width, generator=generator).double()
    outputs = []
    for layer in layers:
        z = layer(x)
        z.retain_grad()
        outputs.append(z)
        x = activation(z)
    outputs[-1].backward(torch.randn(z.shape, generator=generator).double())
    gradients = [z.grad.square().mean().item() for z in outputs if z.grad is not None]
    return [z.square().mean().item() for z in outputs], gradients, density_of(model)
