"""What this rank holds of a parameter: its gradient, and its part of the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..distributed import PLAIN, Shards, is_sharded, local
from .options import coupled_decay, dual_dtype


def local_state(p: Tensor, state: Mapping[Tensor, dict[str, Any]]) -> dict[str, Any]:
    """The state of the part of `p` that this rank holds. `store` afterwards what became of it."""
    if not is_sharded(p):
        return state[p]
    return {k: local(x) if isinstance(x, Tensor) else x for k, x in state[p].items()}


def store(params: list[Tensor], states: list[dict[str, Any]], into: Mapping[Tensor, dict[str, Any]]) -> None:
    """Take over the states of parts, where what is shaped like the weight is kept as a DTensor like it."""
    for p, state in zip(params, states, strict=True):
        if is_sharded(p):
            held = into[p]
            for name, x in state.items():
                if name in PLAIN:
                    held[name] = x
                elif name not in held or local(held[name]) is not x:
                    held[name] = Shards.of(p).wrap(x)


def check_gradient(p: Tensor, optimizer: str) -> Tensor:
    """The gradient of `p`. RuntimeError, naming the optimizer, where it cannot be used."""
    grad: Any = p.grad
    if grad.is_sparse:
        raise RuntimeError(f"{optimizer} does not support sparse gradients; use a layer with sparse=False.")
    if grad.is_complex():
        raise RuntimeError(f"{optimizer} does not support complex gradients; pass real and imaginary parts.")
    return grad


def gradient(p: Tensor, group: dict[str, Any], optimizer: str) -> Tensor:
    """The gradient that a step goes along: in the precision of v, with its sign and the coupled weight decay."""
    grad = check_gradient(p, optimizer)
    if is_sharded(p):  # tensor parallelism may leave sums to be taken
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    grad = local(grad).to(dual_dtype(p))
    if group["maximize"]:
        grad = -grad
    coupled = coupled_decay(group)
    if coupled != 0:
        grad = grad.add(local(p), alpha=coupled)  # after the prox it would be overwritten
    return grad
