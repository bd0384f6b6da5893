"""nn.Linear."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .base import Options, register
from .weighted import WeightedSum


class Linear(WeightedSum):
    in_training = True
    arguments = ("in_features", "out_features")
    options: Options = {"bias": True}

    def dense(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def factors(self, module: Any, rank: int) -> tuple[Any, Any] | None:
        options: Any = {"device": module.weight.device, "dtype": module.weight.dtype}
        first = nn.Linear(module.in_features, rank, bias=False, **options)
        return first, nn.Linear(rank, module.out_features, bias=module.bias is not None, **options)


register(Linear(nn.Linear))
