"""Experts: modules that hold a stack of matrices in one parameter, a matrix per expert, as Transformers does."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor, nn

from .base import Kind, by_looks

_NAME = re.compile("expert|moe", re.IGNORECASE)
_WIDTH = ("hidden_size", "hidden_dim", "d_model", "embed_dim", "input_size")  # what such modules call their input


class Experts(Kind):
    """Its own parameters with three dimensions. Each lies as [experts, outputs, inputs], or transposed.

    Which of the two, the module says by `is_transposed`, as those of Transformers do; else by the width that it reads
    or writes; else the first of its stacks is taken to widen.
    """

    leaf = False

    def weights(self, module: Any) -> tuple[str, ...]:
        return tuple(name for name, p in module._parameters.items() if p is not None and p.dim() == 3)

    def transposed(self, module: Any) -> bool:
        """Whether it computes x @ w[expert]."""
        said = getattr(module, "is_transposed", None)
        if isinstance(said, bool):
            return said
        first = module._parameters[self.weights(module)[0]]
        _, rows, columns = first.shape
        width = next((n for n in (getattr(module, name, None) for name in _WIDTH) if isinstance(n, int)), None)
        if width in (rows, columns) and rows != columns:
            return width == rows
        return rows < columns

    def layout(self, module: Any, name: str) -> str:
        return "eio" if self.transposed(module) else "eoi"

    def bias(self, module: Any, name: str) -> Tensor | None:
        return None  # one per expert where there is any, and no start of its own


def looks_like_experts(module: nn.Module) -> bool:
    """Whether a module of an unknown class is named after experts and holds stacks of matrices."""
    stacks = [p for p in module._parameters.values() if p is not None and p.dim() == 3]
    if not stacks or min(n for p in stacks for n in p.shape) < 2:
        return False
    count = {len(p) for p in stacks}
    said = [value for name, value in vars(module).items() if "expert" in name.lower() and isinstance(value, int)]
    return len(count) == 1 and bool(_NAME.search(type(module).__name__) or count & set(said))


by_looks(looks_like_experts, Experts(nn.Module))
