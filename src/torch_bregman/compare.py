"""Whether two networks compute the same: inputs to try, and how far outputs are apart, as a share of the largest one.

What is allowed is for the caller to say: 1e-5 of float32 sums in another order, 1e-9 of the same ones in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def difference(found: Tensor, wanted: Tensor) -> float:
    """max |found − wanted| / max |wanted| over what is finite in `wanted`; never NaN.

    Where both are the same infinity, or both NaN, they are equal. Another shape is infinitely far, and so are an
    infinity or a NaN that only one of them has, other whole numbers, and what is not zero where all should be.
    """
    if found.shape != wanted.shape:
        return torch.inf
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else torch.inf
    found, wanted = found.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.allclose(found[~finite], wanted[~finite], equal_nan=True):
        return torch.inf
    if not finite.any():
        return 0.0
    off = (found - wanted)[finite].abs().amax().item()
    scale = wanted[finite].abs().amax().item()
    if off != off or not scale:
        return torch.inf if off else 0.0
    return off / scale


def close(found: Any, wanted: Any, tolerance: float) -> bool:
    """Whether outputs, in whatever they are nested, agree to `tolerance` of the largest entry of each tensor.

    Shapes and dtypes must agree too; what is no tensor in `wanted` is not compared.
    """
    pairs = tree_leaves(found), tree_leaves(wanted)
    return len(pairs[0]) == len(pairs[1]) and all(_near(a, b, tolerance) for a, b in zip(*pairs, strict=True))


def _near(found: Any, wanted: Any, tolerance: float) -> bool:
    if not isinstance(wanted, Tensor):
        return True
    if not isinstance(found, Tensor) or found.dtype != wanted.dtype:
        return False
    return difference(found, wanted) <= tolerance


def random_like(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random entries like those of x: noise of the same size, whole numbers of the same range, else some of x itself.

    Whole numbers may be positions in a table, which all those between the smallest and the largest one are.
    """
    if x.is_floating_point():
        size = x.double().square().mean().sqrt().item() if x.numel() else 0.0
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(size or 1.0).to(x)
    if not x.numel():
        return x.new_zeros(shape)
    if x.dtype == torch.bool or x.is_complex():
        return x.flatten()[torch.randint(x.numel(), shape, generator=generator).to(x.device)]
    return torch.randint(int(x.min()), int(x.max()) + 1, shape, generator=generator).to(x)
