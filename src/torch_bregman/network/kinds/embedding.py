"""nn.Embedding: its columns are its outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..walk import Call, Walk, Wire, barrier
from .base import Exchange, Kept, Kind, Options, register


class Embedding(Kind):
    reported = True
    arguments = ("num_embeddings", "embedding_dim")
    options: Options = {"padding_idx": None, "scale_grad_by_freq": False, "sparse": False}

    def sizes(self, module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    def matrix(self, module: Any) -> Tensor:
        return module.weight.detach().T

    def follow(self, walk: Walk, node: fx.Node, module: Any) -> Wire | None:
        """Columns that are the same for all tokens are constant."""
        if len(node.args) != 1 or node.kwargs or module.max_norm is not None:
            return barrier(walk, node, module)
        weight = module.weight.detach().cpu()
        n, dim = weight.shape[1], len(walk.shapes[node]) - 1
        output = walk.emit(dim, walk.new(n), (weight == weight[:1]).all(0), weight[0])
        none = Wire(dim, torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), torch.empty(0))
        walk.calls.append(Call(str(node.target), module, none, output, torch.ones(n, dtype=torch.bool), ()))
        return output

    def cut(self, module: Any, kept: Kept, exchange: Exchange) -> None:
        if kept.outputs is not None:
            exchange("weight", None, kept.outputs)
            module.embedding_dim = len(kept.outputs)


register(Embedding(nn.Embedding))
