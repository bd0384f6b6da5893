"""A trained dense network becomes the start of a sparse one, or an averaged one as sparse as what it averages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .density import check_density
from .distributed import Spread, count_nonzero, is_sharded, local
from .init import fits_groups
from .layers import LayerWeight, note_weights, weight_layers
from .naming import Names, name_weights
from .network.reparametrised import warn_reparametrised
from .regularizers import group_dims
from .warned import warn


@torch.no_grad()
def prune_(
    model: nn.Module, density: float, groups: str | Tensor | None = None, *, weights: Names | None = None
) -> nn.Module:
    """Zero all but the largest weights, so that a share `density` of them is left; what is left keeps its value.

    The n weights of all layers together are ranked by |w|, and exactly round(density·n) stay, at least one. Whole
    `groups` are ranked by the root of their mean square, and so many stay as come nearest.

    What it is for: the start of sparse training from a trained network, and averages of sparse networks (EMA, SWA),
    which have the weights of all the networks that they average.

    Args:
        model: changed in place; biases, norms and embeddings stay as they are.
        density: share in (0, 1].
        groups: "rows", "columns", "kernels", "filters", "channels", or an index tensor, as in `tb.sparse_init_`. Layers
            of another shape are ranked entry by entry.
        weights: names further weights, as in `tb.param_groups`.

    Returns:
        `model`.

    Raises:
        ValueError: density outside (0, 1], a name of groups that does not exist or fits no layer, a model without
            weights, groups of DTensors.

    Warns:
        where fewer weights than asked for are alive already.
    """
    check_density(density, one_allowed=True)
    name_weights(model, weights)
    warn_reparametrised(model)
    layers = [layer for layer in weight_layers(model) if layer.weight.numel()]
    if not layers:
        raise ValueError("`model` has no Linear or Conv layer to prune.")
    fits = fits_groups(groups, layers)
    tensors = [layer.weight for layer in layers]
    size = sum(weight.numel() for weight in tensors)
    kept = max(1, round(density * size))
    alive = sum(count_nonzero(tensors))
    if alive < kept and groups is None:
        warn(f"`density` is {density:g}, but only {alive:,} of {size:,} weights are alive ({alive / size:.2%}).")
    elif any(map(is_sharded, tensors)):
        if groups is not None:
            raise ValueError(f"`groups` is {groups!r}, and weights are DTensors, which are pruned entry by entry only.")
        parts = [local(weight).abs().float().flatten() for weight in tensors]
        least = Spread(parts, tensors).kth_largest(kept)[0]
        for weight, part in zip(tensors, parts, strict=True):
            local(weight).masked_fill_(part.view_as(local(weight)) < least, 0.0)
    else:
        _keep_largest(layers, fits, groups, kept)
    note_weights(model)
    return model


def _keep_largest(layers: list[LayerWeight], fits: list[bool], groups: str | Tensor | None, kept: int) -> None:
    """Zero all groups (or entries) but the largest, which have about `kept` entries together."""
    numbers = [_numbers(layer.weight, groups) if fit else None for layer, fit in zip(layers, fits, strict=True)]
    scores, sizes = [], []
    for layer, group in zip(layers, numbers, strict=True):
        squares = layer.weight.detach().float().square().flatten()
        if group is None:
            count = torch.ones_like(squares)
        else:
            count = torch.bincount(group).to(squares)
            squares = torch.zeros_like(count).index_add_(0, group, squares)
        scores.append(squares / count.clamp_min(1))
        sizes.append(count.long())
    device = scores[0].device
    order = torch.cat([score.to(device) for score in scores]).argsort(descending=True, stable=True)
    entries = torch.cat([size.to(device) for size in sizes])[order].cumsum(0)
    stay = torch.zeros(len(order), dtype=torch.bool, device=device)
    stay[order[: 1 + int((entries - kept).abs().argmin())]] = True
    masks = torch.split(stay, [len(score) for score in scores])
    for layer, group, mask in zip(layers, numbers, masks, strict=True):
        mask = mask.to(layer.weight.device)
        layer.weight.masked_fill_(~(mask if group is None else mask[group]).view(layer.weight.shape), 0.0)


def _numbers(weight: Tensor, groups: str | Tensor | None) -> Tensor:
    """The number of the group of every entry, flat."""
    if isinstance(groups, Tensor):
        numbers = groups.to(weight.device).long()
    else:
        assert groups is not None
        spanned = group_dims(groups, weight.shape)
        small = [1 if d in spanned else n for d, n in enumerate(weight.shape)]
        numbers = torch.arange(torch.Size(small).numel(), device=weight.device).view(small)
    return numbers.expand(weight.shape).flatten()
