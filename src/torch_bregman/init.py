"""Sparse initialisation [J, section 3.3].

[J] Bungert, Roith, Tenbrinck, Burger, A Bregman Learning Framework for Sparse Neural Networks, JMLR 23(192), 2022.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from .density import check_density
from .distributed import assign, is_sharded
from .layers import LayerWeight, note_weights, weight_layers
from .naming import Names, name_weights
from .network.reparametrised import warn_reparametrised
from .optim.options import check_number
from .regularizers import GROUPS, GroupL1, broadcasts, group_dims


@torch.no_grad()
def sparse_init_(
    model: nn.Module,
    density: float = 0.01,
    groups: str | Tensor | None = None,
    generator: Generator | None = None,
    *,
    nonlinearity: str = "relu",
    bias_scale: float = 1.0,
    min_inputs: int = 0,
    weights: Names | None = None,
) -> nn.Module:
    """Redraw all weights so that a share `density` of each is alive and signals keep their variance.

    W = W̃ ⊙ M with M a mask of exactly round(density·n) ones (at least one) drawn without replacement, and
    Var[W̃] = α/r, where α = gain²/fan_in is the usual variance (2/fan_in for ReLU) and r the share alive: zeroing all
    but a share r of the terms of a sum takes a factor r from its variance. θ = 0 would be symmetric and not train.

    Args:
        model: changed in place. Norms and other parameters stay as they are.
        density: r in (0, 1].
        groups: draw whole groups: "rows", "columns", "kernels", "filters", "channels", or an index tensor. Layers of
            another shape (Linear layers under "kernels") are drawn entry by entry.
        generator: where the numbers come from; on the CPU, so that every device gets the same weights. DTensors
            need one, seeded alike on every rank: each draws whole tensors and keeps its part, as one process would.
        nonlinearity: as in `torch.nn.init.calculate_gain`. For "relu" and its like biases are drawn from
            (0, s/√fan_in], so that neurons without inputs start active; for odd activations from both sides of 0.
        bias_scale: s.
        min_inputs: live weights that every unit (row of a Linear, filter of a Conv weight) has at least, also where
            `density` alone would leave it fewer; kernels come whole, and other groups are left. A unit with neither
            inputs nor bias in front of a norm and a ReLU is zero for good, because no gradient comes through: such
            layers need 1.
        weights: names further weights, as in `tb.param_groups`.

    Returns:
        `model`.

    Raises:
        ValueError: density outside (0, 1], a key of `weights` that means nothing, min_inputs that is no count, a name
            of groups that does not exist or fits no layer, DTensors without a generator.
    """
    check_density(density, one_allowed=True)
    check_number("bias_scale", bias_scale)
    if isinstance(min_inputs, bool) or not isinstance(min_inputs, int) or min_inputs < 0:
        raise ValueError(f"Invalid `min_inputs`: {min_inputs!r}; expected a whole number of at least 0.")
    name_weights(model, weights)
    warn_reparametrised(model)
    layers = [layer for layer in weight_layers(model) if layer.weight.numel()]
    if not layers:
        raise ValueError("`model` has no Linear or Conv layer to initialise.")
    if generator is None and any(is_sharded(layer.weight) for layer in layers):
        raise ValueError(
            "`generator` is None, but weights are DTensors and all ranks must draw the same numbers: pass "
            "generator=torch.Generator().manual_seed(seed) with one seed."
        )
    gain = nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
    fits = fits_groups(groups, layers)
    device = generator.device if generator is not None else torch.device("cpu")

    def draw_bias(layer: LayerWeight) -> None:
        bias = layer.bias
        if bias is not None and layer.weight.numel():
            bound = bias_scale / math.sqrt(layer.fan_in)
            low = 0.0 if "relu" in nonlinearity or nonlinearity == "selu" else -bound
            # 1 − u for u in [0, 1) is never zero, and for ReLU positive.
            uniform = 1 - torch.empty(bias.shape, device=device).uniform_(generator=generator)
            assign(bias, low + (bound - low) * uniform)

    for layer, fit in zip(layers, fits, strict=True):
        weight = layer.weight
        mask = _draw_mask(weight.shape, density, groups if fit else None, generator, device)
        if min_inputs and not fit:
            _connect_(mask, layer, min_inputs, generator)
        elif min_inputs and groups == "kernels":
            kernels = mask.flatten(2).any(2)
            _connect_(kernels, layer, math.ceil(min_inputs / math.prod(weight.shape[2:])), generator)
            mask = kernels.view(*kernels.shape, *[1] * (weight.dim() - 2)).expand(weight.shape)
        std = gain / math.sqrt(layer.fan_in * float(mask.float().mean()))
        values = torch.empty(weight.shape, device=device).normal_(0, std, generator=generator)
        # `where`, not a product: −x·0 is a negative zero.
        assign(weight, torch.where(mask, values, 0.0))
        draw_bias(layer)
    drawn = {id(layer.module) for layer in layers}
    for layer in weight_layers(model, tied=True):  # of the other layers that share a weight
        if id(layer.module) not in drawn:
            draw_bias(layer)
    note_weights(model)
    return model


def fits_groups(groups: str | Tensor | None, layers: list[LayerWeight]) -> list[bool]:
    """Which weights consist of such groups. ValueError where there are no such groups, or none consists of them."""
    if groups is None:
        return [False] * len(layers)
    if isinstance(groups, Tensor):
        GroupL1(groups)  # raises where these are no group numbers
        fits = [broadcasts(groups.shape, layer.weight.shape) for layer in layers]
    else:
        if groups not in GROUPS:
            group_dims(groups, layers[0].weight.shape)  # raises, naming the choices
        flat = groups in ("rows", "columns")
        fits = [(layer.weight.dim() == 2) == flat and not layer.stacked for layer in layers]
    if not any(fits):
        shapes = ", ".join(str(tuple(layer.weight.shape)) for layer in layers[:3])
        raise ValueError(f"`groups` is {groups!r}, which fits none of the weights ({shapes}, …).")
    return fits


def _draw_mask(
    shape: torch.Size, density: float, groups: str | Tensor | None, generator: Generator | None, device: torch.device
) -> Tensor:
    """A bool mask of `shape` with round(density·n) of n groups (or entries) alive, at least one."""
    if isinstance(groups, Tensor):
        numbers, index = torch.unique(groups.to(device), return_inverse=True)
        return _draw_mask(numbers.shape, density, None, generator, device)[index].expand(shape)
    if groups is not None:
        spanned = group_dims(groups, shape)
        small = torch.Size([1 if d in spanned else n for d, n in enumerate(shape)])
        return _draw_mask(small, density, None, generator, device).expand(shape)
    n = shape.numel()
    mask = torch.zeros(n, dtype=torch.bool, device=device)
    mask[torch.randperm(n, generator=generator, device=device)[: max(1, round(density * n))]] = True
    return mask.view(shape)


def _connect_(mask: Tensor, layer: LayerWeight, count: int, generator: Generator | None) -> None:
    """Turn on entries, drawn at random, until every unit has `count` or all it can have."""
    places = torch.arange(mask.numel(), device=mask.device).view(mask.shape)
    places = layer.grouped(places).flatten(2).flatten(0, 1)  # [units, inputs of each]
    flat = mask.view(-1)
    missing = count - flat[places].sum(1, keepdim=True)
    scores = torch.rand(places.shape, generator=generator, device=mask.device) - flat[places].float()  # live: below 0
    order = scores.argsort(1, descending=True)
    first = torch.arange(places.shape[1], device=mask.device) < missing
    flat[places.gather(1, order)[first]] = True
