"""Attention and encoders of torch.nn in parts that are called, where torch computes with their weights itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..network.kinds import of
from .links import hooked

WHOLE = "whole"  # the name of the module as it was, in the one that takes its place


class SplitAttention(nn.Module):
    """nn.MultiheadAttention in eval mode with its four projections as Linear layers, on the same tensors.

    What it is not made for (nested tensors, another mode) goes through the module itself.
    """

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        self.whole, self.heads, self.batch_first = module, module.num_heads, module.batch_first
        weights: Any = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        if module.in_proj_weight is not None:
            weights = module.in_proj_weight.chunk(3)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what an encoder layer asks of its attention
            return getattr(super().__getattr__(WHOLE), name)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The arguments are those of nn.MultiheadAttention."""
        if self.training or query.is_nested or (is_causal and attn_mask is None):
            return self.whole(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        single = query.dim() == 2
        x = [t.unsqueeze(0) if single else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in zip((self.query, self.key, self.value), x, strict=True)
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if single:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added to [batch, heads, queries, keys]; True means: do not look."""
        total: Tensor | None = None
        for mask, padding in ((attn_mask, False), (key_padding_mask, True)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if padding:
                mask = mask.view(-1, 1, 1, mask.shape[-1])
            elif mask.dim() == 3:  # for every head
                mask = mask.view(-1, self.heads, *mask.shape[1:])
            total = mask if total is None else total + mask
        return total


class SplitEncoder(nn.TransformerEncoder):
    """nn.TransformerEncoder whose layers may be others; padded inputs, which torch packs first, go its own way."""

    def __init__(self, module: nn.TransformerEncoder) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in vars(module).items() if name[0] != "_"})
        parts: Any = _copy(module)
        self.layers, self.norm, self.whole = parts.layers, parts.norm, module
        self.train(module.training)

    def forward(
        self, src: Tensor, mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:  # fmt: skip
        """The arguments are those of nn.TransformerEncoder."""
        if src_key_padding_mask is not None or src.is_nested:
            return self.whole(src, mask, src_key_padding_mask, is_causal)
        return super().forward(src, mask, None, is_causal)


def split(model: nn.Module) -> nn.Module:
    """`model` with the parts of attention and encoders as layers that are called; itself where it has none."""
    if not any(map(_is_split, model.modules())):
        return model
    whole = nn.ModuleDict({"model": _copy(model)})
    for cls in (nn.TransformerEncoder, nn.MultiheadAttention):  # in this order: an encoder keeps its attention
        made: dict[int, nn.Module] = {}
        for name, module in list(whole.named_modules(remove_duplicate=False)):
            if type(module) is cls and _is_split(module) and WHOLE not in name.split("."):
                put(whole, name, made.setdefault(id(module), _PARTS[cls](module)))
    return whole["model"]


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another; its neighbours are called from now on, whatever is faster otherwise."""
    model.set_submodule(name, module)
    parent = model.get_submodule(name.rpartition(".")[0])
    of(parent).part_replaced(parent)


def _copy(model: nn.Module) -> nn.Module:
    """Other modules on the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], len(weight), device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]
    return layer.eval()


def _is_split(module: Any) -> bool:
    if hooked(module) or type(module) not in _PARTS:
        return False
    return not any(getattr(module, name, None) is not None for name in ("bias_k", "bias_v")) and not getattr(
        module, "add_zero_attn", False
    )


_PARTS: dict[type[nn.Module], Any] = {nn.TransformerEncoder: SplitEncoder, nn.MultiheadAttention: SplitAttention}
