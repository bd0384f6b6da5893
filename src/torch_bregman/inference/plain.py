"""Layers in the words of torch.nn: what computes as a Linear does becomes one, for which there are sparse products."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..network import WeightedSum, kinds
from .links import hooked


def plain(model: nn.Module) -> nn.Module:
    """`model` with stock layers in the place of those that compute the same; itself where there are none.

    Those are subclasses of Linear and Conv2d that change nothing about the call, and layers of registered kinds that
    are a Linear by another name, such as Conv1D of Transformers. Tensors are shared where they lie alike.
    """
    if all(_plain(module) is None for module in model.modules()):
        return model
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, tensors)
    made = {id(module): found for module in model.modules() if (found := _plain(module)) is not None}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and id(module) in made:
            model.set_submodule(name, made[id(module)])
    return made.get(id(model), model)


def _plain(module: Any) -> nn.Module | None:
    """The stock layer that computes what `module` computes; None where it is one, or there is none."""
    cls = type(module)
    if cls in (nn.Linear, nn.Conv2d) or hooked(module) or "forward" in vars(module):
        return None
    for stock in (nn.Linear, nn.Conv2d):
        names = [name for name in ("forward", "_conv_forward") if hasattr(stock, name)]
        if isinstance(module, stock) and all(getattr(cls, name) is getattr(stock, name) for name in names):
            same = stock.__new__(stock)
            same.__dict__.update(
                {name: copy.copy(value) if name[0] == "_" else value for name, value in vars(module).items()}
            )
            return same
    kind = kinds.of(module)
    if not isinstance(kind, WeightedSum) or type(kind).channels is not WeightedSum.channels:
        return None
    weight, bias = kind.matrix(module).detach(), kind.bias(module, "weight")
    if weight.dim() != 2 or kind.groups(module) != 1:
        return None
    linear = nn.Linear(weight.shape[1], len(weight), device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return linear.eval()
