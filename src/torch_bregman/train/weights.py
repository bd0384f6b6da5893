"""The weights of a run as files, whatever they are laid out like, and pictures of where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import nn

from ..distributed import whole
from ..files import write_atomically
from ..layers import weight_layers
from ..report import weight_pattern
from .errors import writing
from .ranks import ONE_PROCESS, Processes


def save_model(path: Path, model: nn.Module, ranks: Processes = ONE_PROCESS) -> None:
    """The weights as safetensors; of several ranks the first writes them."""
    state = whole_state(model, ranks)
    if not ranks.first:
        return
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    # One copy of tied tensors: safetensors refuses two names for one memory.
    seen: dict[int, str] = {}
    unique = {n: t for n, t in tensors.items() if t.numel() == 0 or seen.setdefault(t.data_ptr(), n) == n}
    with writing(path):
        write_atomically(path, to_safetensors(unique))


def load_model(path: Path, model: nn.Module, ranks: Processes = ONE_PROCESS) -> None:
    """Read what `save_model` wrote."""
    state: dict[str, Any] = load_file(path) if ranks.first else {}
    if ranks.size == 1:
        model.load_state_dict(state, strict=False)  # of tied weights one is in the file
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, state, options=options)


def whole_state(model: nn.Module, ranks: Processes) -> dict[str, Any]:
    """`model.state_dict()` in one piece, with FSDP on the CPU of the first rank only."""
    ranks.share_buffers(model)
    if ranks.strategy != "fsdp":
        return model.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def keep_patterns(run: Path, when: str, model: nn.Module, ranks: Processes) -> None:
    """Add the pictures of where the weights are non-zero to patterns.npz."""
    path = run / "patterns.npz"
    new = {
        f"{when}/{name}": weight_pattern(whole(w.detach(), lambda part: part).cpu())
        for name, _, w in weight_layers(model)
    }
    if not ranks.first:
        return
    pictures: dict[str, np.ndarray[Any, Any]] = {}
    if path.exists() and when != "start":
        with np.load(path, allow_pickle=False) as old:
            pictures = {name: old[name] for name in old.files}
    with writing(path):
        write_atomically(path, lambda file: np.savez_compressed(file, **(pictures | new)))  # type: ignore[arg-type]
