"""Layers whose weight is computed anew from other tensors in every call, by torch's own tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..warned import warn

#: torch's hooks that write a plain attribute, what says its name, and what removes them
_HOOKS = (
    (BasePruningMethod, "_tensor_name", "prune.remove"),
    (WeightNorm, "name", "remove_weight_norm"),
    (SpectralNorm, "name", "remove_spectral_norm"),
)


class Reparametrised(NamedTuple):
    """A tensor that is no parameter of its layer, the layer, and the line that makes it one again."""

    name: str
    module: nn.Module
    remedy: str


def reparametrised(model: nn.Module) -> Iterator[Reparametrised]:
    """What parametrizations (weight_norm, spectral_norm, orthogonal, …), their older forms and `prune` compute."""
    for layer, module in model.named_modules():
        found = []
        if parametrize.is_parametrized(module):
            found += [(name, "parametrize.remove_parametrizations") for name in module.parametrizations]
        for hook in module._forward_pre_hooks.values():
            found += [(getattr(hook, attribute), remedy) for cls, attribute, remedy in _HOOKS if isinstance(hook, cls)]
        where = f"model.get_submodule({layer!r})" if layer else "model"
        for name, remedy in found:
            line = f"torch.nn.utils.{remedy}({where}, {name!r})"
            yield Reparametrised(f"{layer}.{name}" if layer else name, module, line)


def described(model: nn.Module) -> str:
    """One sentence about the reparametrised tensors of `model`, with the remedy; empty where there are none."""
    found = list(reparametrised(model))
    if not found:
        return ""
    names = ", ".join(name for name, _, _ in found[:3]) + (", …" if len(found) > 3 else "")
    verb = "is" if len(found) == 1 else "are"
    return (
        f"{names} {verb} computed from other tensors in every call (by torch's parametrizations or pruning), so no "
        f"optimizer can make {'it' if len(found) == 1 else 'them'} sparse; first call {found[0].remedy}."
    )


def refuse_reparametrised(model: nn.Module) -> None:
    """ValueError where a tensor of `model` is reparametrised: it cannot be copied or cut as it is."""
    sentence = described(model)
    if sentence:
        raise ValueError(f"Invalid `model`: {sentence}")


def warn_reparametrised(model: nn.Module) -> None:
    """One warning where tensors of `model` are passed over because they are reparametrised."""
    sentence = described(model)
    if sentence:
        warn(f"Passed over in `model`: {sentence}")
