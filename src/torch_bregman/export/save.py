"""`save_sparse`: a network without its zeros, in one file; see file.py for what is in it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from ..distributed import require_whole
from ..files import write_atomically
from ..layers import matrix_entries, weight_layers
from ..network.reparametrised import described
from ..network.wrapped import DENSER, bare, is_average
from ..text import Shown, table
from . import descriptions
from .file import (
    ENTRY,
    HEADER_LIMIT,
    METADATA,
    NO_DIGEST,
    PATTERNS,
    VERSION,
    Pathlike,
    identity,
    integers,
    is_graph,
    tensors_of,
    too_large,
    where_kept,
    wide,
)
from .patterns import MASK, Array, encode


class SavedTensor(NamedTuple):
    """How one tensor was stored: `kept` of its entries are not zero, `bytes` instead of `dense_bytes`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str  # "dense", "bitmask" or "gaps"
    kept: int
    bytes: int
    dense_bytes: int


@dataclass(frozen=True, repr=False)
class Saved(Shown):
    """What `save_sparse` wrote; prints as a sentence with the bytes before and after.

    `dense_bytes`: what safetensors takes for the same tensors in their own dtypes, a tied one once. `kept` of `size`:
    non-zero entries of the weights, which are `size` of `matrices`, the entries of all parameters with two dimensions
    or more. `tensors`: one row per stored tensor, `table()` prints them. `notes`: what else has to be known.
    """

    path: Path
    bytes: int
    dense_bytes: int
    kept: int
    size: int
    tensors: tuple[SavedTensor, ...] = ()
    matrices: int = 0
    notes: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """kept / size, as `tb.density` of the stored network; NaN without weights."""
        return self.kept / self.size if self.size else math.nan

    @property
    def share(self) -> float:
        """bytes / dense_bytes."""
        return self.bytes / self.dense_bytes

    def shown(self) -> list[str]:
        weights = f"; {self.kept:,} of {self.size:,} weights kept ({self.density:.3%})" if self.size else ""
        if self.matrices > self.size:
            weights += f", which are {self.size:,} of {self.matrices:,} matrix entries"
        return [
            f"{self.path}: {self.bytes:,} bytes, {self.share:.2%} of the {self.dense_bytes:,} stored dense{weights}",
            *self.notes,
        ]

    def to_dict(self) -> dict[str, float | str]:
        made: dict[str, float | str] = {"path": str(self.path), "bytes": self.bytes, "dense_bytes": self.dense_bytes}
        if self.size:
            made |= {"density": self.density, "kept": self.kept, "size": self.size}
        return made | {f"bytes/{row.name}": row.bytes for row in self.tensors}

    def table(self) -> str:
        """One row per stored tensor."""
        rows = [["tensor", "shape", "dtype", "stored as", "kept", "bytes", "dense"]]
        for row in self.tensors:
            shape, dtype = "×".join(map(str, row.shape)), str(row.dtype).removeprefix("torch.")
            rows.append([row.name, shape, dtype, row.encoding, *(f"{number:,}" for number in row[4:])])
        return table(rows, left=range(4))


@torch.no_grad()
def save_sparse(model: nn.Module, path: Pathlike, *, dtype: torch.dtype | None = None) -> Saved:
    """Write the parameters and persistent buffers of `model` to one safetensors file without their zeros.

    Each tensor takes the smallest of: dense, bitmask and values, gaps and values. A tied tensor is stored once. What
    was at `path` stays until the new file is whole.

    Args:
        model: on any device; what `torch.compile`, data parallelism or averaging put around it does not show in the
            file, nor does `torch.compile` around its parts.
        path: where to; by convention *.safetensors.
        dtype: round the floating point parameters that have more bits to `torch.bfloat16` or `torch.float16`; buffers
            stay as they are. None: nothing is rounded, and `load_sparse` gives back every bit.

    Returns:
        `Saved`: bytes before and after, density; print it.

    Raises:
        ValueError: a `dtype` that is none of these, a finite value that would become infinite in it, a tensor without
            values (lazy, meta) or with those of one rank (DTensor), a module with an extra state or with anything else
            in its `state_dict` that is no parameter or buffer, as quantized ones have.
        OSError: the file could not be written.
    """
    require_whole(model, "tb.save_sparse")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"Invalid `dtype`: {dtype!r}; expected torch.bfloat16, torch.float16 or None.")
    averaged, model, path = is_average(model), bare(model), Path(path)
    tensors = tensors_of(model)
    parameters = {identity(tensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    counted = {identity(layer.weight) for layer in weight_layers(model)}

    payload: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    patterns: list[Array] = []
    rows: list[SavedTensor] = []
    modules, graph = descriptions.describe_parts(model), is_graph(model)
    header: dict[str, Any] = {"version": VERSION, "sha256": NO_DIGEST, "kept": 0, "size": 0, "sparse": {}, "same": {},
                              "complex": [], "modules": modules, "graph": graph}  # fmt: skip
    for name, original in tensors.items():
        key = identity(original)
        if first.setdefault(key, name) != name:
            header["same"][name] = first[key]
            continue
        tensor = original.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if dtype is not None and key in parameters and tensor.is_floating_point() and tensor.element_size() > 2:
            if fault := too_large(tensor, dtype):
                raise ValueError(f"Invalid `dtype`: {name} {fault}.")
            tensor = tensor.to(dtype)
        if key in counted:
            header["kept"] += int(torch.count_nonzero(wide(tensor)))
            header["size"] += tensor.numel()
        if tensor.is_complex():
            header["complex"].append(name)
            tensor = torch.view_as_real(tensor)
        values = _sparse(tensor)
        if values.entry is not None:
            header["sparse"][name] = values.entry
        payload[name] = values.tensor
        patterns += values.patterns
        before = original.numel() * original.element_size()
        rows.append(SavedTensor(name, tuple(original.shape), tensor.dtype, *values[:3], before))
    if any(map(len, patterns)):
        payload[PATTERNS] = torch.from_numpy(np.concatenate(patterns))
    content = _content(payload, {key: value for key, value in header.items() if value})
    write_atomically(path, content)
    _, matrices, _ = matrix_entries(model)
    notes = tuple(filter(None, (DENSER if averaged else "", described(model))))
    dense = _dense_bytes({row.name: tensors[row.name] for row in rows})
    return Saved(path, len(content), dense, header["kept"], header["size"], tuple(rows), matrices, notes)


class _Encoded(NamedTuple):
    """What is stored of a tensor: how, its kept entries, its bytes; where it is sparse, its entry in the header."""

    encoding: str
    kept: int
    bytes: int
    tensor: Tensor
    entry: list[Any] | None = None
    patterns: tuple[Array, ...] = ()


def _sparse(tensor: Tensor) -> _Encoded:
    """The smallest form of a real tensor that is contiguous and on the CPU."""
    bits = integers(tensor)
    nonzero, negative = where_kept(bits, tensor.is_floating_point())
    kept, each = int(np.count_nonzero(nonzero)), bits.itemsize
    (code, pattern), (code2, second) = encode(nonzero), encode(negative)
    size = kept * each + len(pattern) + len(second)
    if size + ENTRY >= len(bits) * each:
        # A copy, for safetensors refuses tensors that share memory.
        return _Encoded("dense", kept, len(bits) * each, tensor.clone())
    entry = [list(tensor.shape), code, len(pattern)]
    if len(second):
        entry += [code2, len(second), int(negative.sum())]
    values = torch.from_numpy(bits[nonzero]).view(tensor.dtype)
    return _Encoded("bitmask" if code == MASK else "gaps", kept, size, values, entry, (pattern, second))


def _content(payload: dict[str, Tensor], header: dict[str, Any]) -> bytearray:
    """The bytes of the file, with their checksum."""
    text = json.dumps(header, separators=(",", ":"))
    try:
        content = bytearray(safetensors.torch.save(payload, {METADATA: text}))
    except KeyError as error:
        raise ValueError(f"Invalid `model`: safetensors {safetensors.__version__} has no dtype {error}.") from None
    length = int.from_bytes(content[:8], "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"Invalid `model`: its tensors need a header of {length:,} bytes; at most {HEADER_LIMIT:,}.")
    at = content.index(NO_DIGEST.encode(), content.index(b'sha256\\":\\"'))
    content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    return content


def _dense_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that safetensors writes for these tensors, without writing it."""
    codes = {torch.bool: "BOOL", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
             torch.uint8: "U8", torch.int8: "I8", torch.complex128: "C128"}  # fmt: skip

    def place(item: tuple[str, Tensor]) -> tuple[int, bool, str]:
        each = item[1].element_size()
        return -each, item[1].is_floating_point() == (each == 8), item[0]  # int64, float64, float32, int32, …

    header, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=place):
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = codes.get(tensor.dtype, "F32")  # the others have three letters too
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + (len(text) + 7) // 8 * 8 + end
