"""Attention: heads can be taken out of nn.MultiheadAttention, which then becomes an `Attention`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attention
from .base import Exchange, Kind, Options, register


class MultiheadAttention(Kind):
    """Its projections are packed into one weight, [3 · width, width], or three; that of the output is a layer in it."""

    reported = True
    has_heads = True
    reads_parts = True

    def weights(self, module: Any) -> tuple[str, ...]:
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(name for name in names if module._parameters.get(name) is not None)

    def layout(self, module: Any, name: str) -> str:
        return "oi"

    def bias(self, module: Any, name: str) -> Tensor | None:
        return None  # no ReLU follows, so that it needs no start of its own

    def positions(self, module: Any, x: torch.Size) -> int:
        return math.prod(x[:-1])

    def flops(self, module: Any, x: torch.Size, *, zeros: bool = True) -> int:
        """Of the projections, with keys and values as many as queries; the output's is not called as a layer."""
        weights = [*(module._parameters[name] for name in self.weights(module)), module.out_proj.weight]
        return 2 * self.positions(module, x) * sum(w.numel() if zeros else int(w.count_nonzero()) for w in weights)

    def sizes(self, module: Any) -> tuple[int, int]:
        return module.num_heads, module.embed_dim

    def live_heads(self, module: Any) -> Tensor | None:
        """None where the module holds more than projections.

        A head does not matter if its values are constant, for its output is their bias then whatever it looks at, or
        if the output projection ignores it.
        """
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return None
        packed, heads = module.in_proj_weight, module.num_heads
        value = module.v_proj_weight if packed is None else packed.chunk(3)[2]
        alive = (value.detach() != 0).view(heads, -1).any(1)
        read = (module.out_proj.weight.detach() != 0).view(module.embed_dim, heads, -1).any(2).any(0)
        return alive & read

    def with_heads(self, module: Any, alive: Tensor, exchange: Exchange) -> nn.Module:
        width, head = module.embed_dim, module.head_dim
        rows = alive.repeat_interleave(head).nonzero().view(-1)
        gone = (~alive).repeat_interleave(head).nonzero().view(-1)
        small = Attention(
            width, int(alive.sum()), head, key_width=module.kdim, value_width=module.vdim,
            bias=module.in_proj_bias is not None, dropout=module.dropout, batch_first=module.batch_first,
        ).to(module.out_proj.weight)  # fmt: skip
        for i, layer in enumerate(("query", "key", "value")):
            owner, at = getattr(small, layer), rows + i * width
            if module.in_proj_weight is not None:
                exchange("in_proj_weight", at, owner=owner, target="weight")
            else:
                exchange(f"{'qkv'[i]}_proj_weight", rows, owner=owner, target="weight")
            exchange("in_proj_bias", at, owner=owner, target="bias")
        out, shift = module.out_proj, None
        if module.in_proj_bias is not None:  # the values of a head that is gone
            bias = module.in_proj_bias.detach()[2 * width :][gone].double()
            shift = out.weight.detach()[:, gone].double() @ bias
        exchange("out_proj.weight", None, rows, owner=small.out, target="weight")
        if out.bias is not None:
            value = None if shift is None else out.bias.double() + shift
            exchange("out_proj.bias", value=value, owner=small.out, target="bias")
        else:
            small.out.bias = None if shift is None else nn.Parameter(shift.to(out.weight))  # type: ignore[assignment]
        return small


class FewerHeads(Kind):
    """`Attention`, whose projections are layers of their own."""

    arguments = ("width", "heads", "head_width")
    options: Options = {"key_width": None, "value_width": None, "bias": True, "batch_first": False}

    def sizes(self, module: Any) -> tuple[int, int]:
        return module.heads, module.out.out_features


class TransformerLayer(Kind):
    """nn.TransformerDecoderLayer and the encoder's: they are followed step by step, see `trace`."""

    reads_parts = True


class TransformerEncoderLayer(TransformerLayer):
    def part_replaced(self, module: Any) -> None:
        module.activation_relu_or_gelu = 0  # its fused path would take the weights that were there


register(MultiheadAttention(nn.MultiheadAttention))
register(FewerHeads(Attention))
register(TransformerEncoderLayer(nn.TransformerEncoderLayer))
register(TransformerLayer(nn.TransformerDecoderLayer))
