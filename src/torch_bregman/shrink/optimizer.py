"""The optimizer that goes on with the smaller network."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.base import BregmanOptimizer
from ..part import Piece
from .copy import ShrinkingCopy


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    levels = getattr(optimizer, "levels", None)
    if levels is not None:
        levels.leave()
    known = {id(p) for p in model.parameters()}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if id(p) not in known:
                raise ValueError(
                    f"`optimizer` holds a parameter of shape {tuple(p.shape)} in group {i} that the model does not "
                    "have; expected an optimizer of this model."
                )


def follow(optimizer: torch.optim.Optimizer, model: nn.Module, smaller: ShrinkingCopy) -> torch.optim.Optimizer:
    """An optimizer of the same class for the smaller network, with the part of the state that belongs to it."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=True)}
    same = dict(smaller.model.named_parameters(remove_duplicate=False))
    regularizers = getattr(optimizer, "regularizers", None)
    groups: list[dict[str, Any]] = []
    state: list[tuple[Tensor, Piece | None, dict[str, Any]]] = []
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in group.items() if k not in ("params", "regularizer", "param_names")}
        reg = None if regularizers is None else regularizers[i]
        together: list[Tensor] = []
        for p in group["params"]:
            parts = smaller.parts.get(p)
            if parts is None:
                together.append(same[names[id(p)]])
                state.append((together[-1], None, optimizer.state.get(p, {})))
                continue
            for part in parts:
                own = {k: _restrict(v, part) if k in ("lam", "delta") else v for k, v in options.items()}
                state.append((part.small, part, optimizer.state.get(p, {})))
                if reg is None or reg.elementwise:
                    together.append(part.small)
                    continue
                cut = reg.cut(part, optimizer.state.get(p, {}).get("dual"), group["lam"])
                if cut is None:
                    cut = reg
                    smaller.notes.append(f"{reg!r} goes on with what is left of {names[id(p)]}.")
                groups.append({"params": [part.small], **own, "regularizer": cut})
        if together:
            groups.append({"params": together, **options, **({} if regularizers is None else {"regularizer": reg})})
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted and k != "regularizer"}
    new = type(optimizer)(groups, **defaults)
    for small, whole, held in state:
        if held:
            new.state[small] = {k: _restrict(v, whole) for k, v in held.items()}
            if isinstance(new, BregmanOptimizer) and whole is not None:
                _settle(new, small)
    return new


def _restrict(value: Any, part: Piece | None) -> Any:
    """What belongs to the part, of something shaped like its parameter; of others a copy."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    if part is None or value.dim() == 0 or value.numel() == 1:
        return value.detach().clone()
    if value.shape != part.full.shape:
        value = value.expand_as(part.full)
    return part.restrict(value)


def _settle(optimizer: BregmanOptimizer, p: Tensor) -> None:
    """Let v follow a constant that was folded into its weight."""
    if "dual" in optimizer.state[p]:
        optimizer.state[p].pop("written", None)
        optimizer.follow(p)
