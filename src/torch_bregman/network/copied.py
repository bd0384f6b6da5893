"""A copy of a network, or a sentence that says which tensor of it torch cannot copy."""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .reparametrised import refuse_reparametrised


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ValueError: a tensor of `model` is computed from others: by torch's parametrizations or pruning, or by hand.
    """
    refuse_reparametrised(model)
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        name = _computed(model)
        if name is None:
            raise
        raise ValueError(
            f"Invalid `model`: {name} holds a tensor that was computed with gradients, and torch cannot copy it; "
            "expected a parameter, a buffer or what .detach() gives."
        ) from error


def _computed(model: nn.Module) -> str | None:
    """The first attribute that holds a tensor which is no leaf of the graph of gradients."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_modules") and any(
                isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in tree_leaves(value)
            ):
                return f"{name}.{attribute}" if name else attribute
    return None
