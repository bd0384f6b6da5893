"""The sparse start of a run."""

from __future__ import annotations

import torch
from torch import nn

from ..init import sparse_init_
from ..layers import weight_layers
from ..network import kinds
from .denoising import denoises
from .recipe import Recipe, densities, linear_and_conv_groups


def start_sparse(recipe: Recipe, model: nn.Module) -> None:
    """Draw the sparse start in groups that fit the regulariser."""
    wanted = densities(recipe, model)
    generator = torch.Generator().manual_seed(recipe.seed)
    layers = list(weight_layers(model))
    # Few rows alive is a low rank, the sparse start of the nuclear norm.
    low_rank = recipe.regularizer == "nuclear"
    chosen = ("rows", "filters") if low_rank else linear_and_conv_groups(recipe)
    normed = any(kinds.of(module).statistics for module in model.modules())
    for groups, linear in zip(chosen, (True, False), strict=True):
        for _, module, weight in layers:
            if (weight.dim() == 2) == linear:
                start = min(recipe.initial_density, wanted.get(weight, 1.0) / 2)
                # A norm takes the bias off again that would wake a unit without inputs.
                asleep = normed or getattr(module, "bias", None) is None
                sparse_init_(module, start, groups, generator, min_inputs=int(asleep))
                if recipe.regularizer == "nonnegative-l1":
                    weight.data.abs_()
    if not layers:
        return  # the optimizer has the sentence for it
    _, _, first = layers[0]
    if chosen[first.dim() != 2] is not None:
        # 1/r makes up for what is dead in the layer before, but all of the data are alive: here only the share of the
        # inputs counts that a live unit has.
        alive = first.data.flatten(1) != 0
        first.data.mul_((alive.float().mean() / alive[alive.any(1)].float().mean()).sqrt())
    if denoises(model):
        # With a random image at the output the first steps push all neurons away from it, and most ReLUs die.
        layers[-1].weight.data.mul_(0.1)
