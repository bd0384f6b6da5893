"""Whether the smaller network computes the same."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import compare

TRIALS = 2  # random inputs beside the example


def difference(model: nn.Module, small: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The largest difference of the outputs in eval, relative to the largest output, on the example and random inputs.

    In float64 where the networks can compute in it.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        pair = [copy.deepcopy(m).eval() for m in (model, small)]
        trials = [inputs, *([compare.random_like(x, tuple(x.shape), generator) for x in inputs] for _ in range(TRIALS))]
        for trial in trials:
            try:
                outputs = [tree_leaves(m.double()(*[_double(x) for x in trial])) for m in pair]
            except (RuntimeError, TypeError):  # a dtype that is written in the code
                pair = [copy.deepcopy(m).eval() for m in (model, small)]
                outputs = [tree_leaves(m(*[x.clone() for x in trial])) for m in pair]
            for a, b in zip(*outputs, strict=True):
                if isinstance(a, Tensor):
                    # What cancels out exactly in one network may leave a rounding error in the other.
                    zero = a.is_floating_point() and a.shape == b.shape and a.numel() and not a.any()
                    worst = max(worst, float(b.abs().nan_to_num(torch.inf).max()) if zero else compare.difference(b, a))
    return worst


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x.clone()
