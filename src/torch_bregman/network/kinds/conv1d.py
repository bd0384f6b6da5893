"""Conv1D of Hugging Face Transformers (GPT-2): y = x W + b, a Linear whose weight lies as [inputs, outputs]."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import foreign
from .weighted import WeightedSum


class Conv1D(WeightedSum):
    rows_are_outputs = False
    counts = ("nf", "nx")
    arguments = None  # a file that built it by its name could take another library's class for it

    def dense(self, module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = torch.matmul(x, weight)
        return y if bias is None else y + bias


foreign("transformers.pytorch_utils.Conv1D", Conv1D)
