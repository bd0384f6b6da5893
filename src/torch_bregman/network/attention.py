"""Attention with fewer heads than nn.MultiheadAttention can have at this width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    r"""out(concat_h softmax(q_h k_hᵀ / √d) v_h), where the heads together may be narrower than the inputs.

    nn.MultiheadAttention ties heads · d to the width of its input, so a head cannot be taken out of it. This module is
    called like it, with masks and with or without `batch_first`, and returns (output, None): weights averaged over the
    heads that are left would be other ones.

    Args:
        width: of queries and outputs.
        heads: how many.
        head_width: d, of each.
        key_width, value_width: of keys and values; `width` by default.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, *, key_width: int | None = None, value_width: int | None = None,
        bias: bool = True, dropout: float = 0.0, batch_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.heads, self.head_width = width, heads, head_width
        self.key_width, self.value_width = key_width or width, value_width or width
        self.bias, self.dropout, self.batch_first = bias, dropout, batch_first
        self.query = nn.Linear(width, heads * head_width, bias)
        self.key = nn.Linear(self.key_width, heads * head_width, bias)
        self.value = nn.Linear(self.value_width, heads * head_width, bias)
        self.out = nn.Linear(heads * head_width, width, bias)
        # What nn.TransformerEncoderLayer looks at before it takes a path of its own.
        self.in_proj_bias, self._qkv_same_embed_dim, self.num_heads = None, False, heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The arguments are those of nn.MultiheadAttention."""
        single = query.dim() == 2
        x = [t.unsqueeze(0) if single else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in zip((self.query, self.key, self.value), x, strict=True)
        )
        mask = self._mask(q, attn_mask, key_padding_mask)
        y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y.squeeze(0) if single else y if self.batch_first else y.transpose(0, 1)), None

    def _mask(self, q: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """Both masks as one that is added, [batch, 1, queries, keys]; True means: do not look."""
        total: Any = None
        for mask, axes in ((attn_mask, (0, 0)), (key_padding_mask, (1, 1))):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, float("-inf"))
            if axes == (1, 1):
                mask = mask.view(-1, 1, 1, mask.shape[-1])
            elif mask.dim() == 3:
                raise ValueError(
                    f"`attn_mask` has shape {tuple(mask.shape)}; expected [queries, keys]: heads are gone."
                )
            total = mask if total is None else total + mask
        return total
