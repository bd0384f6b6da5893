"""What a denoiser gets and what it is compared with, and where it starts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from ..data import Dataset
from ..layers import weight_layers
from .recipe import DENOISERS, Recipe


@dataclass(frozen=True)
class Denoising:
    """Samples of `data`, normalised and with noise, go in; what they were before both should come out.

    `noise`: its standard deviation before normalisation: of images, in units of pixels in [0, 1].
    """

    data: Dataset
    noise: float

    @classmethod
    def of(cls, model: nn.Module, data: Dataset, recipe: Recipe) -> Denoising | None:
        """Of a `model` that says `task = "denoise"`; None for all others.

        Raises ValueError where a built-in one, which ends in a ReLU, would have to give negative pixels.
        """
        if not denoises(model):
            return None
        low = float(data.raw(data.train.x.amin(0, keepdim=True)).min())  # of one sample, not a copy of them all
        if recipe.model in DENOISERS and len(data.shape) == 3 and low < -1e-5:  # rounding is less
            raise ValueError(
                f"Model {recipe.model!r} gives pixels, of 0 or more; the images of {data.name!r} go down to {low:.3g}. "
                "Expected pixels in [0, 1]."
            )
        return cls(data, recipe.noise)

    def noisy(self, x: Tensor, generator: Generator) -> Tensor:
        """What goes in: `x` and fresh noise."""
        noise = torch.randn(x.shape, device=x.device, generator=generator).to(x)
        _, std = self.data.moments
        return x + self.noise / std * noise

    def clean(self, x: Tensor) -> Tensor:
        """What should come out."""
        return self.data.raw(x)


def denoises(model: nn.Module) -> bool:
    """Is it trained to take noise away, and not to tell classes?"""
    return getattr(model, "task", "classify") == "denoise"


@torch.no_grad()
def start_at_mean(model: nn.Module, clean: Tensor) -> None:
    """Let a denoiser say the mean of `clean` first, by the bias of its last layer where that is as large.

    Else all neurons learn the mean at once, with one gradient for all, and many ReLUs are dead after that.
    """
    layers = list(weight_layers(model))
    bias = layers[-1].module._parameters.get("bias") if layers else None
    if bias is not None and bias.numel() == clean[0].numel():
        bias.copy_(clean.mean(0, dtype=torch.float32).view_as(bias))
