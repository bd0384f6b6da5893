"""The sparse file: the live values of a network and where they are, in one safetensors file without pickle.

    the file      safetensors: a JSON header, then the bytes of the tensors
    NAME          a tensor stored dense under its own name and shape, or only its kept values, one-dimensional
    ..patterns    uint8: where the kept values of all sparse tensors are, in the order of `sparse`
    header        in `__metadata__["torch_bregman"]`, JSON:
        version   1
        sha256    of the whole file, with these 64 digits as zeros
        kept      non-zero entries of the Linear and Conv weights, and `size`, how many entries these have
        sparse    {NAME: [shape, code, bytes of its pattern]}; codes as in patterns.py
        same      {NAME: NAME of the stored tensor that it is tied to}
        complex   [NAME, …]: stored as pairs of reals in a last dimension
        modules   {path: [kind, arguments …, {options that differ from their defaults}]}; kinds as in network/kinds
        graph     true where the network is a torch.fx.GraphModule, whose code the file does not hold

Every bit comes back, those of NaN too. −0.0, which multiplying by a mask leaves behind in numbers, is not kept as a
value: where a tensor has some, a second pattern says where, [shape, code, bytes, code, bytes, how many].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .descriptions import places
from .patterns import Array

VERSION = 1
METADATA = "torch_bregman"
PATTERNS = "..patterns"
NO_DIGEST = "0" * 64
HEADER_LIMIT = 1 << 23  # bytes; about 150 are needed per tensor
ENTRY = 48  # bytes that a sparse tensor takes in the header
MOST = 1 << 62  # entries
KEYS = {"version", "sha256", "kept", "size", "sparse", "same", "complex", "modules", "graph"}
COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}

Pathlike = str | os.PathLike[str]


# ---- what a model holds


def slots_of(model: nn.Module, prefix: str = "") -> dict[str, tuple[dict[str, Any], str]]:
    """Where parameters and persistent buffers are held, (dict, key), under their names in `state_dict`."""
    modules = [(prefix, model), *((f"{path}.", place.module) for path, place in places(model, prefix))]
    return {
        path + leaf: (holder, leaf)
        for path, module in modules
        for holder in (module._parameters, module._buffers)
        for leaf, tensor in holder.items()
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def tensors_in(slots: Mapping[str, tuple[dict[str, Any], str]]) -> dict[str, Tensor]:
    return {name: holder[leaf] for name, (holder, leaf) in slots.items()}


def tensors_of(model: nn.Module, argument: str = "model") -> dict[str, Tensor]:
    """The very tensors of the model by name. ValueError naming what a sparse file cannot hold."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"Invalid `{argument}`: {path or 'it'} is a ScriptModule, which torch.jit.save saves whole."
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            kind = type(module).__name__
            raise ValueError(f"Invalid `{argument}`: {path or 'it'} ({kind}) has an extra state, which is no tensor.")
    found = tensors_in(slots_of(model))
    for name, tensor in found.items():
        fault = (
            "not initialised yet" if nn.parameter.is_lazy(tensor)
            else "on the meta device, without values" if tensor.is_meta
            else f"of the layout {tensor.layout}" if tensor.layout != torch.strided
            else "quantized" if tensor.is_quantized
            else f"a {type(tensor).__name__}, made of other tensors" if is_traceable_wrapper_subclass(tensor)
            else None
        )  # fmt: skip
        if fault is not None:
            raise ValueError(f"Invalid `{argument}`: {name} is {fault}; expected ordinary tensors.")
    if fault := _beside(model, found):
        raise ValueError(f"Invalid `{argument}`: {fault}")
    return found


def _beside(model: nn.Module, found: Mapping[str, Tensor]) -> str | None:
    """What is wrong where the state of the model has more in it than these parameters and buffers."""
    known = {identity(tensor) for tensor in found.values()}
    for key, value in model.state_dict().items():
        name = ".".join(part for part in key.split(".") if part != "_orig_mod")
        if name in found or (isinstance(value, Tensor) and identity(value) in known):
            continue
        path = name.rpartition(".")[0]
        while (module := _module(model, path)) is None:
            path = path.rpartition(".")[0]
        return (
            f"its state_dict has {name!r}, of {path or 'the model'} ({type(module).__name__}), which is neither a "
            "parameter nor a buffer, so a sparse file would lack it; use torch.save, or the network before it was "
            "quantized."
        )
    return None


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def is_graph(model: nn.Module) -> bool:
    return any(isinstance(module, fx.GraphModule) for module in model.modules())


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors: the same memory seen in the same way."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())


# ---- values


def integers(tensor: Tensor) -> Array:
    """The bits of a contiguous real tensor on the CPU as integers, flat and without a copy."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(integer).numpy()


def negative_zero(bits: Array) -> int:
    """The integer with the bits of −0.0: the sign alone."""
    return 0x80 if bits.dtype == np.uint8 else int(np.iinfo(bits.dtype).min)


def where_kept(bits: Array, floating: bool) -> tuple[Array, Array]:
    """Masks of what is neither 0 nor −0.0, and of the −0.0."""
    nonzero = bits != 0
    if not floating:
        return nonzero, np.zeros(0, np.bool_)
    negative = bits == negative_zero(bits)
    return nonzero & ~negative, negative


def wide(tensor: Tensor) -> Tensor:
    """`tensor`, or where it has eight bits a float32 copy: torch computes little with those."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def too_large(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong where a finite value becomes infinite in `dtype`."""
    lost = wide(tensor).isfinite() & ~wide(tensor.to(dtype)).isfinite()
    return f"holds {float(tensor[lost][0]):g}, which is infinite in {dtype}" if bool(lost.any()) else None
