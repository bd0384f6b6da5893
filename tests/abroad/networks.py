"""Small networks of Hugging Face Transformers, made from their configs, with batches, and their weights by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 64
NAMES = ["bert", "gpt2", "llama", "t5", "mixtral"]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}


def build(name: str, seed: int = 0) -> nn.Module:
    import transformers as hf

    torch.manual_seed(seed)
    if name == "bert":
        return hf.BertForSequenceClassification(
            hf.BertConfig(vocab_size=TOKENS, max_position_embeddings=16, num_labels=4, **SIZES)
        )
    if name == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(  # without dropout, so that a loop of one's own sees the same
                vocab_size=TOKENS,
                n_positions=16,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    if name == "llama":
        config = hf.LlamaConfig(vocab_size=TOKENS, num_key_value_heads=2, max_position_embeddings=16, **SIZES)
        return hf.LlamaForCausalLM(config)
    if name == "t5":
        config = hf.T5Config(
            vocab_size=TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        return hf.T5ForConditionalGeneration(config)
    config = hf.MixtralConfig(
        vocab_size=TOKENS, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=16, **SIZES
    )
    return hf.MixtralForCausalLM(config)


def batches(name: str, count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of eight, of sequences that count up, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        start = torch.randint(TOKENS, (8, 1), generator=generator)
        tokens = (start + torch.arange(12)) % TOKENS
        labels = start[:, 0] % 4 if name == "bert" else tokens
        found.append({"input_ids": tokens, "labels": labels})
    return found


def samples(name: str, count: int) -> list[dict[str, Any]]:
    """The same, one by one, as a Trainer wants them."""
    return [
        {key: value[i].tolist() for key, value in batch.items()}
        for batch in batches(name, -(-count // 8))
        for i in range(8)
    ][:count]


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """By hand: what has two dimensions or more, belongs to no embedding, and routes no tokens to experts."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    routers = {id(m.weight) for m in model.modules() if type(m).__name__.endswith("Router")}
    return {
        name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in embeddings | routers
    }  # fmt: skip


def alive(model: nn.Module) -> float:
    weights = matrices(model).values()
    return sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights)
