"""What a network takes: parameters, FLOPs, bytes in a file, memory in a forward pass."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..export.formats import rows_of
from ..layers import forward_flops, matrix_entries, weight_layers
from .figures import Fact


@torch.no_grad()
def facts(
    dense: nn.Module, sparse: nn.Module, shrunk: nn.Module, optimized: nn.Module, inputs: tuple[Tensor, ...],
    batch: int, saved: int,
) -> tuple[Fact, ...]:  # fmt: skip
    """Of the dense and of the sparse network, shrunk and optimized. `saved`: bytes of the sparse file."""
    largest = rows_of(inputs, batch)
    counted, every, _ = matrix_entries(sparse)
    alive = live_weights(sparse)
    return (
        Fact("parameters", parameters(dense), parameters(shrunk), "",
             "of the dense network all; of the shrunk one non-zero weights, and all biases and norms"),
        Fact("weights", live_weights(dense), alive, "",
             f"non-zero ones as trained, {alive / max(1, counted):.2%} of {counted:,}; these are {counted:,} of "
             f"{every:,} matrix entries"),
        Fact("FLOPs per sample", flops(dense, inputs), flops(shrunk, inputs), "FLOP",
             "2 × weights × positions of the Linear and Conv layers by formula, zeros not counted: what has to be "
             "computed, not what a dense kernel does"),
        Fact("file", dense_bytes(dense), saved, "B",
             "dense: safetensors; sparse: what save_sparse makes of the shrunk network"),
        Fact(f"memory at batch {batch}", memory(dense, largest), memory(optimized, largest), "B",
             "what the network holds and the most that its tensors take at once in a forward pass, added up "
             "allocation by allocation, without the libraries' own scratch; an optimized network also keeps "
             "what is left of its dense weights, for inputs that the sparse products cannot take"),
    )  # fmt: skip


def parameters(model: nn.Module) -> int:
    """Non-zero Linear and Conv weights, and all other parameters."""
    weights = {id(layer.weight) for layer in weight_layers(model)}
    return sum(int(p.count_nonzero()) if id(p) in weights else p.numel() for p in model.parameters())


def live_weights(model: nn.Module) -> int:
    """Non-zero weights."""
    return sum(int(layer.weight.count_nonzero()) for layer in weight_layers(model))


def flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """2 · non-zero weights · positions, per sample: positions as a forward pass has them."""
    return float(sum(forward_flops(model, rows_of(inputs, 1), zeros=False).values()))


def dense_bytes(model: nn.Module) -> int:
    """Of a safetensors file with all parameters and buffers."""
    once = {t.untyped_storage().data_ptr(): (name, t) for name, t in model.state_dict().items()}
    return len(to_safetensors({name: t.contiguous() for name, t in once.values()}))


class _AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that are alive at once, in `most`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known | known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, which: int, size: int) -> None:
        self.known.discard(which)
        self.now -= size


def memory(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    """Bytes that the network holds, and the most that the tensors of a forward pass take at once."""
    model(*inputs)  # what is made in the first call is held
    with _AliveBytes() as alive:
        model(*inputs)
    return held(model) + alive.most


def held(root: object) -> int:
    """Bytes of the tensors and arrays that can be reached from a module, each counted once."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    stack: list[Any] = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            sizes[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            while isinstance(thing.base, np.ndarray):
                thing = thing.base
            sizes[thing.__array_interface__["data"][0]] = thing.nbytes
        elif isinstance(thing, Mapping):
            stack += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            stack += thing
        elif isinstance(thing, functools.partial):
            stack += [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, types.MethodType):
            stack += [thing.__self__, thing.__func__]
        elif isinstance(thing, types.FunctionType):
            for cell in thing.__closure__ or ():
                try:
                    stack.append(cell.cell_contents)
                except ValueError:  # not filled yet
                    continue
        elif isinstance(thing, nn.Module) or type(thing).__module__.startswith("torch_bregman"):
            stack += getattr(thing, "__dict__", {}).values()
            stack += [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
    return sum(sizes.values())
