"""Networks whose architecture is searched for: scalar skips under ℓ1 that start at 0, neurons or kernels in groups.

[N] Bungert, Roith, Tenbrinck, Burger, "Neural Architecture Search via Bregman Iterations", arXiv 2106.02479.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..distributed import whole
from ..network import kinds
from ..regularizers import L1, Regularizer
from .shapes import Shape, image_shape


class SkipChain(nn.Module):
    """Layers of one width in a row, x_l = layer_l(x_{l−1}) + Σ_{i<l} s_{l,i} x_i for l = 1 … L; returns x_L.

    `skips` is s as a matrix [L, L], row l − 1 and column i; above the diagonal it is not used and stays 0. All skips
    start at 0, so that the chain starts as its layers alone.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.skips = nn.Parameter(torch.zeros(len(self.layers), len(self.layers)))

    def forward(self, x: Tensor) -> Tensor:
        earlier = [x]
        for layer, gates in zip(self.layers, self.skips, strict=True):
            out = layer(earlier[-1])
            for gate, before in zip(gates, earlier, strict=False):
                out = out + gate * before
            earlier.append(out)
        return earlier[-1]


class SkipNet(nn.Sequential):
    """Modules in a row, some of them chains with skips, which the training loop puts under ℓ1."""

    #: pattern of parameter names → (regulariser, λ), beside those of the recipe for Linear and Conv weights
    penalties: ClassVar[dict[str, tuple[Regularizer, float]]] = {"*.skips": (L1(), 1.96)}


class SkipEncoder(SkipNet):
    """The denoising autoencoder, six Linear layers as wide as the input, with skips from every layer to later ones.

    On images each layer has a ReLU, the last one too; arrays end in a Linear layer.
    """

    task = "denoise"

    def __init__(self, shape: Shape) -> None:
        width = math.prod(shape)
        layers: list[nn.Module] = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(6)]
        if len(shape) != 3:
            layers[-1] = nn.Linear(width, width)
        chain = SkipChain(layers)
        super().__init__(nn.Flatten(), chain, nn.Unflatten(1, shape))


def skipencoder(shape: Shape, classes: int) -> nn.Module:
    """The skip-encoder of [N]; `classes` is not used."""
    return SkipEncoder(shape)


def densenet(shape: Shape, classes: int, width: int = 16, depth: int = 4) -> nn.Module:
    """Two dense blocks of `depth` 3×3 convolutions of `width` filters, in which each layer sees gated earlier outputs.

    Each block follows a 3×3 convolution with a stride of 2; an average over the image and a Linear layer end it.
    """
    channels, _, _ = image_shape("densenet", shape)

    def conv(inputs: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, stride, padding=1), nn.ReLU())

    return SkipNet(
        conv(channels, 2), SkipChain(conv(width) for _ in range(depth)),
        conv(width, 2), SkipChain(conv(width) for _ in range(depth)),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )  # fmt: skip


def skips(model: nn.Module) -> list[dict[str, Any]]:
    """Of every chain in `model` the matrix `skips`, what is not 0 has survived, and how many layers come before it."""
    found: list[dict[str, Any]] = []
    before = 0
    for module in model.modules():
        if isinstance(module, SkipChain):
            found.append({"before": before, "skips": whole(module.skips.detach(), lambda t: t).tolist()})
        before += bool(kinds.of(module).weights(module))
    return found
