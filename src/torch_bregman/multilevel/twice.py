"""Gradients that are to be differentiated themselves (`create_graph=True`): by torch's own operations, densely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..part import Part


def gradients(
    compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], grad: Tensor
) -> list[Any]:
    """The gradients of compute(*inputs) to those that are `wanted`, as functions of the inputs and of `grad`."""
    asked = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
    found = iter(torch.autograd.grad(compute(*inputs), asked, grad, create_graph=True))
    return [next(found) if want and x is not None else None for x, want in zip(inputs, wanted, strict=True)]


def placed(values: Tensor, pattern: Part, near: Part | None) -> Tensor:
    """The weight with these `values`; those `near` the threshold count as zero, and have a gradient."""
    count = len(pattern)
    flat = values.new_zeros(pattern.full_shape.numel()).index_copy(0, pattern.index, values[:count])
    if near is not None:
        flat = flat.index_copy(0, near.index, values[count:] - values[count:].detach())
    return flat.view(pattern.full_shape)
