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
        modules   {path: [kind, arguments …, {options that differ from their defaults}]}; kinds as in kinds.py
        graph     true where the network is a torch.fx.GraphModule, whose code the file does not hold

Every bit comes back, those of NaN too. −0.0, which multiplying by a mask leaves behind in numbers, is not kept as a
value: where a tensor has some, a second pattern says where, [shape, code, bytes, code, bytes, how many].
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from ..distributed import require_whole
from ..files import write_atomically
from ..layers import weight_layers
from . import kinds
from .kinds import DEPTH, Description, Place, describe, is_count, places, short, unwrapped
from .patterns import MASK, Array, decode, encode

VERSION = 1
METADATA = "torch_bregman"
PATTERNS = "..patterns"
NO_DIGEST = "0" * 64
HEADER_LIMIT = 1 << 23  # bytes; about 150 are needed per tensor
ENTRY = 48  # bytes that a sparse tensor takes in the header
MOST = 1 << 62  # entries
KEYS = {"version", "sha256", "kept", "size", "sparse", "same", "complex", "modules", "graph"}
COMPLEX = {torch.float16: torch.complex32, torch.float32: torch.complex64, torch.float64: torch.complex128}
FROM_MODEL = ("eps", "momentum", "max_norm", "norm_type", "dropout")  # which no file holds

Pathlike = str | os.PathLike[str]


# ---- what a model holds


def _slots(model: nn.Module, prefix: str = "") -> dict[str, tuple[dict[str, Any], str]]:
    """Where parameters and persistent buffers are held, (dict, key), under their names in `state_dict`."""
    modules = [(prefix, model), *((f"{path}.", place.module) for path, place in places(model, prefix))]
    return {
        path + leaf: (holder, leaf)
        for path, module in modules
        for holder in (module._parameters, module._buffers)
        for leaf, tensor in holder.items()
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def _held(slots: Mapping[str, tuple[dict[str, Any], str]]) -> dict[str, Tensor]:
    return {name: holder[leaf] for name, (holder, leaf) in slots.items()}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The very tensors of the model by name. ValueError naming what a sparse file cannot hold."""
    for path, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            kind = type(module).__name__
            raise ValueError(f"Invalid `model`: {path or 'it'} ({kind}) has an extra state, which is no tensor.")
    found = _held(_slots(model))
    for name, tensor in found.items():
        fault = (
            "not initialised yet" if nn.parameter.is_lazy(tensor)
            else "on the meta device, without values" if tensor.is_meta
            else f"of the layout {tensor.layout}" if tensor.layout != torch.strided
            else "quantized" if tensor.is_quantized
            else None
        )  # fmt: skip
        if fault is not None:
            raise ValueError(f"Invalid `model`: {name} is {fault}; expected ordinary tensors.")
    return found


def _is_graph(model: nn.Module) -> bool:
    return any(isinstance(module, fx.GraphModule) for module in model.modules())


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tied tensors: the same memory seen in the same way."""
    if tensor.numel() == 0 or tensor.is_meta:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())


# ---- values


def _integers(tensor: Tensor) -> Array:
    """The bits of a contiguous real tensor on the CPU as integers, flat and without a copy."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.reshape(-1).view(integer).numpy()


def _negative_zero(bits: Array) -> int:
    """The integer with the bits of −0.0: the sign alone."""
    return 0x80 if bits.dtype == np.uint8 else int(np.iinfo(bits.dtype).min)


def _where_kept(bits: Array, floating: bool) -> tuple[Array, Array]:
    """Masks of what is neither 0 nor −0.0, and of the −0.0."""
    nonzero = bits != 0
    if not floating:
        return nonzero, np.zeros(0, np.bool_)
    negative = bits == _negative_zero(bits)
    return nonzero & ~negative, negative


def _wide(tensor: Tensor) -> Tensor:
    """`tensor`, or where it has eight bits a float32 copy: torch computes little with those."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _too_large(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong where a finite value becomes infinite in `dtype`."""
    lost = _wide(tensor).isfinite() & ~_wide(tensor.to(dtype)).isfinite()
    return f"holds {float(tensor[lost][0]):g}, which is infinite in {dtype}" if bool(lost.any()) else None


# ---- save


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
class Saved:
    """What `save_sparse` wrote; prints as a sentence with the bytes before and after.

    `dense_bytes`: what safetensors takes for the same tensors in their own dtypes, a tied one once. `kept` of `size`:
    non-zero entries of the Linear and Conv weights. `tensors`: one row per stored tensor, `table()` prints them.
    """

    path: Path
    bytes: int
    dense_bytes: int
    kept: int
    size: int
    tensors: tuple[SavedTensor, ...] = ()

    @property
    def density(self) -> float:
        """kept / size, as `tb.density` of the stored network; NaN without Linear and Conv weights."""
        return self.kept / self.size if self.size else math.nan

    @property
    def share(self) -> float:
        """bytes / dense_bytes."""
        return self.bytes / self.dense_bytes

    def __str__(self) -> str:
        weights = f"; {self.kept:,} of {self.size:,} weights kept ({self.density:.3%})" if self.size else ""
        return f"{self.path}: {self.bytes:,} bytes, {self.share:.2%} of the {self.dense_bytes:,} stored dense{weights}"

    __repr__ = __str__

    def table(self) -> str:
        """One row per stored tensor."""
        rows = [["tensor", "shape", "dtype", "stored as", "kept", "bytes", "dense"]]
        for row in self.tensors:
            shape, dtype = "×".join(map(str, row.shape)), str(row.dtype).removeprefix("torch.")
            rows.append([row.name, shape, dtype, row.encoding, *(f"{number:,}" for number in row[4:])])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        pad = [str.ljust] * 4 + [str.rjust] * 3
        return "\n".join("  ".join(p(c, w) for p, c, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows)


@torch.no_grad()
def save_sparse(model: nn.Module, path: Pathlike, *, dtype: torch.dtype | None = None) -> Saved:
    """Write the parameters and persistent buffers of `model` to one safetensors file without their zeros.

    Each tensor takes the smallest of: dense, bitmask and values, gaps and values. A tied tensor is stored once. What
    was at `path` stays until the new file is whole.

    Args:
        model: on any device; `torch.compile` around it or its parts does not show in the file.
        path: where to; by convention *.safetensors.
        dtype: round the floating point parameters that have more bits to `torch.bfloat16` or `torch.float16`; buffers
            stay as they are. None: nothing is rounded, and `load_sparse` gives back every bit.

    Returns:
        `Saved`: bytes before and after, density; print it.

    Raises:
        ValueError: a `dtype` that is none of these, a finite value that would become infinite in it, a tensor without
            values (lazy, meta) or with those of one rank (DTensor), a module with an extra state.
        OSError: the file could not be written.
    """
    require_whole(model, "tb.save_sparse")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"Invalid `dtype`: {dtype!r}; expected torch.bfloat16, torch.float16 or None.")
    path, model = Path(path), unwrapped(model)
    tensors = _tensors(model)
    parameters = {_identity(tensor) for tensor in tensors.values() if isinstance(tensor, nn.Parameter)}
    counted = {_identity(layer.weight) for layer in weight_layers(model)}

    payload: dict[str, Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    patterns: list[Array] = []
    rows: list[SavedTensor] = []
    modules, graph = kinds.describe_parts(model), _is_graph(model)
    header: dict[str, Any] = {"version": VERSION, "sha256": NO_DIGEST, "kept": 0, "size": 0, "sparse": {}, "same": {},
                              "complex": [], "modules": modules, "graph": graph}  # fmt: skip
    for name, original in tensors.items():
        key = _identity(original)
        if first.setdefault(key, name) != name:
            header["same"][name] = first[key]
            continue
        tensor = original.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if dtype is not None and key in parameters and tensor.is_floating_point() and tensor.element_size() > 2:
            if fault := _too_large(tensor, dtype):
                raise ValueError(f"Invalid `dtype`: {name} {fault}.")
            tensor = tensor.to(dtype)
        if key in counted:
            header["kept"] += int(torch.count_nonzero(_wide(tensor)))
            header["size"] += tensor.numel()
        if tensor.is_complex():
            header["complex"].append(name)
            tensor = torch.view_as_real(tensor)
        bits = _integers(tensor)
        nonzero, negative = _where_kept(bits, tensor.is_floating_point())
        kept, each = int(np.count_nonzero(nonzero)), bits.itemsize
        (code, pattern), (code2, second) = encode(nonzero), encode(negative)
        encoding, size = "dense", len(bits) * each
        less = kept * each + len(pattern) + len(second)
        if less + ENTRY < size:
            encoding, size = "bitmask" if code == MASK else "gaps", less
            entry = [list(tensor.shape), code, len(pattern)]
            header["sparse"][name] = [*entry, code2, len(second), int(negative.sum())] if len(second) else entry
            patterns += [pattern, second]
            payload[name] = torch.from_numpy(bits[nonzero]).view(tensor.dtype)
        else:
            payload[name] = tensor.clone()  # safetensors refuses tensors that share memory
        before = original.numel() * original.element_size()
        rows.append(SavedTensor(name, tuple(original.shape), tensor.dtype, encoding, kept, size, before))
    if any(map(len, patterns)):
        payload[PATTERNS] = torch.from_numpy(np.concatenate(patterns))
    text = json.dumps({key: value for key, value in header.items() if value}, separators=(",", ":"))
    try:
        content = bytearray(safetensors.torch.save(payload, {METADATA: text}))
    except KeyError as error:
        raise ValueError(f"Invalid `model`: safetensors {safetensors.__version__} has no dtype {error}.") from None
    length = int.from_bytes(content[:8], "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"Invalid `model`: its tensors need a header of {length:,} bytes; at most {HEADER_LIMIT:,}.")
    at = content.index(NO_DIGEST.encode(), content.index(b'sha256\\":\\"'))
    content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    write_atomically(path, content)
    dense = _dense_bytes({row.name: tensors[row.name] for row in rows})
    return Saved(path, len(content), dense, header["kept"], header["size"], tuple(rows))


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


# ---- read


class _Stored(NamedTuple):
    """A tensor of the file, not expanded yet: all its values (`code` None), or the kept ones and their pattern."""

    shape: tuple[int, ...]
    values: Tensor
    code: int | None = None
    pattern: Array = np.empty(0, np.uint8)
    negative_code: int = 0  # of the −0.0
    negative: Array = np.empty(0, np.uint8)
    negatives: int = 0

    def expand(self, where: tuple[Array, Array] | None) -> Tensor:
        """The dense tensor, pairs of reals where it is complex. `where`: see `_File.where`."""
        if where is None:
            return self.values
        bits = _integers(self.values)
        dense = np.zeros(math.prod(self.shape), bits.dtype)
        dense[where[0]] = bits
        dense[where[1]] = _negative_zero(bits)
        return torch.from_numpy(dense).view(self.values.dtype).reshape(self.shape)


@dataclass(frozen=True)
class _File:
    path: Path
    size: int  # bytes
    header: dict[str, Any]
    tensors: dict[str, _Stored]
    same: dict[str, str]
    complex: frozenset[str]
    modules: dict[str, Description]

    def where(self, name: str) -> tuple[Array, Array] | None:
        """The positions of the values and of the −0.0; None where all are there. ValueError if a pattern is damaged."""
        stored = self.tensors[name]
        if stored.code is None:
            return None
        n = math.prod(stored.shape)
        try:
            kept = decode(stored.pattern, stored.code, len(stored.values), n)
            return kept, decode(stored.negative, stored.negative_code, stored.negatives, n)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {short(name)}: {error}.") from None


def _some(names: list[str]) -> str:
    return ", ".join(map(short, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _read(path: Path, limit: int | None) -> _File:
    """Read and check everything but the patterns. ValueError with one sentence, OSError if there is no file.

    Memory: about twice the file, and no more than that is allocated on the word of the file. A file of more than
    `limit` bytes is not read.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file.")  # a pipe would never end
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit + HEADER_LIMIT:
            raise ValueError(f"{path} has {size:,} bytes, more than the {limit:,} that were expected at most.")
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{" or length > max(size, HEADER_LIMIT):
            raise ValueError(f"{path} is not a safetensors file.")
        if length > HEADER_LIMIT:
            raise ValueError(f"{path} has a header of {length:,} bytes; a sparse file has at most {HEADER_LIMIT:,}.")
        if 8 + length > size:
            raise ValueError(f"{path} is truncated: {size:,} bytes, and its header alone has {length:,}.")
        file.seek(0)
        content = file.read(size)
    try:
        metadata = json.loads(content[8 : 8 + length].decode()).get("__metadata__") or {}
        text = metadata.get(METADATA)
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged: its header cannot be read.") from None
    if not isinstance(text, str):
        raise ValueError(f"{path} is a safetensors file, but no sparse file; safetensors.torch.load_file reads it.")
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        version = header["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        version = None
    if not is_count(version, MOST) or version < 1:
        raise ValueError(f"{path} is damaged: its description cannot be read.")
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer version (format {version}); update torch-bregman.")
    if fault := _digest_fault(content, 8 + length, header.get("sha256")):
        raise ValueError(f"{path} is {fault}.")
    try:
        return _parse(path, size, header, safetensors.torch.load(content))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}.") from None
    except (safetensors.SafetensorError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: safetensors cannot read it ({short(str(error))}).") from None


def _digest_fault(content: bytes, end: int, digest: object) -> str | None:
    """Every bit of the file counts, but for the digits of the digest, which are compared."""
    known = isinstance(digest, str) and len(digest) == 64 and digest.isascii()
    at = content.find(str(digest).encode(), 0, end) if known else -1
    if at < 0:
        return "damaged: it has no checksum"
    total = hashlib.sha256(content[:at] + NO_DIGEST.encode())
    total.update(memoryview(content)[at + 64 :])
    if total.hexdigest() == digest:
        return None
    return f"damaged or truncated: its checksum does not fit its {len(content):,} bytes"


def _parse(path: Path, size: int, header: dict[str, Any], payload: dict[str, Tensor]) -> _File:
    """What the header says about the tensors, checked. ValueError saying what is wrong, without the file."""
    if not header.keys() <= KEYS:
        raise ValueError(f"its description has the unknown {_some(sorted(header.keys() - KEYS))}")
    kept, total = header.get("kept", 0), header.get("size", 0)
    if not (is_count(total, MOST) and is_count(kept, total)):
        raise ValueError(f"it keeps {short(kept)} of {short(total)} weights")
    sparse, same, modules = (header.get(key, {}) for key in ("sparse", "same", "modules"))
    if not all(isinstance(table, dict) for table in (sparse, same, modules)) or header.get("graph", True) is not True:
        raise ValueError("its description is no table of names")
    pairs = header.get("complex", [])
    if not (isinstance(pairs, list) and all(isinstance(name, str) for name in pairs)):
        raise ValueError("its list of complex tensors is no list of names")
    patterns = payload.pop(PATTERNS, torch.empty(0, dtype=torch.uint8))
    if patterns.dtype != torch.uint8 or patterns.dim() != 1:
        raise ValueError("its patterns are no bytes")
    if unknown := sorted((sparse.keys() | set(pairs)) - payload.keys()):
        raise ValueError(f"it describes {_some(unknown)}, which it does not hold")
    tensors: dict[str, _Stored] = {}
    rest = patterns.numpy()
    for name, entry in sparse.items():
        values = payload[name]
        if not _is_entry(entry):
            raise ValueError(f"the description of {short(name)} is {short(entry)}")
        shape, code, length, negative_code, negative_length, negatives = entry if len(entry) == 6 else (*entry, 0, 0, 0)
        what = f"{short(name)} of shape {short(tuple(shape))}"
        room = math.prod(shape) - len(values) if values.dim() == 1 else -1
        if room < 0 or math.prod(side or 1 for side in shape) > MOST:
            raise ValueError(f"{what} has values of {short(tuple(values.shape))}")
        if negatives > room or (negatives and not values.is_floating_point()):
            raise ValueError(f"{what} has {negatives:,} negative zeros")
        if length + negative_length > len(rest):
            raise ValueError(f"the pattern of {short(name)} ends beyond the patterns")
        pattern, negative, rest = np.split(rest, [length, length + negative_length])
        tensors[name] = _Stored(tuple(shape), values, code, pattern, negative_code, negative, negatives)
    if len(rest):
        raise ValueError(f"it has {len(rest):,} bytes of patterns too many")
    for name, values in payload.items():
        tensors.setdefault(name, _Stored(tuple(values.shape), values))
        if values.dtype == torch.bool and values.numel() and int(values.view(torch.uint8).max()) > 1:
            raise ValueError(f"{short(name)} holds bools that are neither true nor false")
    if len(set(pairs)) != len(pairs):
        raise ValueError("a complex tensor is listed twice")
    for name in pairs:
        if tensors[name].shape[-1:] != (2,) or tensors[name].values.dtype not in COMPLEX:
            raise ValueError(f"{short(name)} does not hold pairs of reals")
    for name, target in same.items():
        if name in tensors or not isinstance(target, str) or target not in tensors:
            raise ValueError(f"{short(name)} is said to be the same as {short(target)}")
    for where, description in modules.items():
        if where.count(".") > DEPTH or not kinds.is_description(description):
            raise ValueError(f"the module {short(where)} is described as {short(description)}")
    return _File(path, size, header, tensors, same, frozenset(pairs), modules)


def _is_entry(value: object) -> bool:
    """[shape, code, bytes], and for −0.0 [code, bytes, how many] after these."""
    if not (isinstance(value, list) and len(value) in (3, 6) and isinstance(value[0], list) and len(value[0]) <= 64):
        return False
    codes = [code for code in value[1:4:2] if code != MASK]
    counts = [*value[0], *value[2:3], *value[4:]]
    return all(is_count(n, MOST) for n in counts) and all(is_count(n, 62) for n in codes) and value[5:] != [0]


@torch.no_grad()
def read_sparse(path: Pathlike, *, limit: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a sparse file, dense, by name, and what its header says; needs no model.

    Args:
        path: the file.
        limit: how many bytes the dense tensors may take together. None: 64 MiB and a thousand times the file, enough
            down to a density of about 0.1 %, so that a small file from elsewhere cannot fill the memory.

    Returns:
        (tensors, header). Tied tensors are one tensor under several names. The header: `version`, `kept`, `size`,
        `density` of the Linear and Conv weights, `tensors` with shape, dtype, encoding and kept entries of each stored
        tensor, `same` (tied names) and `modules`.

    Raises:
        ValueError: the file is damaged, is none of ours, or is larger than `limit` when dense.
        OSError: there is no such file.
    """
    if limit is not None and not is_count(limit, MOST):
        raise ValueError(f"Invalid `limit`: {limit!r}; expected a number of bytes or None.")
    file = _read(Path(path), limit)
    allowed = (64 << 20) + 1000 * file.size if limit is None else limit
    needed = sum(math.prod(stored.shape) * stored.values.element_size() for stored in file.tensors.values())
    if needed > allowed:
        raise ValueError(f"{path} has tensors of {needed:,} bytes, more than {allowed:,}; read_sparse takes a `limit`.")
    found: dict[str, Tensor] = {}
    rows = {}
    for name, stored in file.tensors.items():
        dense = stored.expand(file.where(name))
        found[name] = torch.view_as_complex(dense) if name in file.complex else dense
        encoding = {None: "dense", MASK: "bitmask"}.get(stored.code, "gaps")
        nonzero, _ = _where_kept(_integers(stored.values), stored.values.is_floating_point())
        rows[name] = {"shape": tuple(found[name].shape), "dtype": found[name].dtype, "encoding": encoding,
                      "kept": int(np.count_nonzero(nonzero))}  # fmt: skip
    found.update({name: found[target] for name, target in file.same.items()})
    kept, size = file.header.get("kept", 0), file.header.get("size", 0)
    return found, {"version": VERSION, "kept": kept, "size": size, "density": kept / size if size else math.nan,
                   "tensors": rows, "same": file.same, "modules": file.modules}  # fmt: skip


# ---- load


@torch.no_grad()
def load_sparse(model: nn.Module, path: Pathlike) -> nn.Module:
    """Load what `save_sparse` wrote into `model`, in place; nothing in the file is run.

    `model` is the network that was saved or a fresh one of the same architecture. Values are copied into its tensors:
    their storage, device and dtype stay (a bfloat16 file loads into a float32 network). Where the file holds a smaller
    layer of a known kind in the place of one of the model's, as `tb.shrink` leaves them, the layer is replaced by a
    fresh one on the same device, with the same dtype, mode and `requires_grad`; build the optimizer afterwards.

    Everything is checked before anything is written. Memory: the file and one dense tensor at a time.

    Returns:
        `model`.

    Raises:
        ValueError: the file is damaged, is none of ours, was written by a newer version, or does not fit the model,
            which is as it was then.
        OSError: there is no such file.
    """
    inner = unwrapped(model)
    tensors = _tensors(inner)
    # Larger files than this hold another network.
    file = _read(Path(path), (1 << 30) + sum(16 * tensor.numel() for tensor in tensors.values()))
    positions = {name: file.where(name) for name in file.tensors}
    standing = dict(places(inner))
    try:
        replaced, larger = _replacements(file, inner, standing)
        slots = {name: slot for p, module in replaced.items() for name, slot in _slots(module, f"{p}.").items()}
        stay = {name: t for name, t in tensors.items() if not any(name.startswith(f"{p}.") for p in replaced)}
        _check_fit(file, stay | _held(slots), larger)
        _check_values(file, stay | _held(slots), positions)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the model: {error}.") from None

    _materialise(replaced, standing, next(iter(tensors.values()), None))
    targets = stay | _held(slots)
    groups: dict[str, list[str]] = {name: [name] for name in file.tensors}
    for name, target in file.same.items():
        groups[target].append(name)
    for stored, names in groups.items():
        one = targets[next((name for name in names if name in stay), names[0])]
        for name in names:
            if name in slots and isinstance(targets[name], nn.Parameter) == isinstance(one, nn.Parameter):
                holder, leaf = slots[name]
                holder[leaf] = targets[name] = one  # tied as in the file
        value = file.tensors[stored].expand(positions.pop(stored))
        for tensor in {_identity(targets[name]): targets[name] for name in names}.values():
            tensor.copy_(torch.view_as_complex(value) if stored in file.complex else value)
    for at, module in replaced.items():
        standing[at].parent._modules[standing[at].leaf] = module
    return model


def _replacements(
    file: _File, model: nn.Module, standing: Mapping[str, Place]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules of the model that are of another kind or size in the file, built without memory, by path.

    Also the paths of those that are too large in the file to be put into the model. A module without tensors may be
    missing in the model; the tensors of any other will be missed by name.
    """
    if file.header.get("graph") and not _is_graph(model):
        raise ValueError(
            "it holds a torch.fx.GraphModule, for sizes in the code of the network had to change; load it into the "
            "model that tb.shrink returns, or export that model with save_program"
        )
    found: dict[str, nn.Module] = {}
    larger: list[str] = []
    done: set[str] = set()  # with everything below
    shared: dict[tuple[int, str], nn.Module] = {}  # one module in several places stays one
    for path in sorted(file.modules.keys() & standing.keys(), key=lambda path: (path.count("."), path)):
        old = standing[path].module
        above = any(path[:i] in done for i, letter in enumerate(path) if letter == ".")
        if above or describe(old) == file.modules[path]:
            continue
        done.add(path)
        key = (id(old), json.dumps(file.modules[path]))
        new = shared[key] = shared[key] if key in shared else kinds.build(path, file.modules)
        if describe(old) is None and _shapes(old) == _shapes(new):
            continue  # a module of the user's own, which holds the same tensors
        if _is_smaller(new, old):
            found[path] = new
        else:
            larger.append(path)
    if found and _is_graph(model):
        raise ValueError(f"{_some(list(found))} is another in the file, and a GraphModule keeps its own")
    return found, larger


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _held(_slots(module)).items()}


def _is_smaller(new: nn.Module, old: nn.Module) -> bool:
    """Whether `new` takes no more memory than `old`, up to four biases (an attention's) as long as its longest side."""

    def size(module: nn.Module, biases: bool) -> int:
        tensors = {id(t): (n, t) for n, t in [*module.named_parameters(), *module.named_buffers()]}.values()
        return sum(t.numel() for n, t in tensors if n.endswith("bias") == biases)

    longest = max((side for t in [*old.parameters(), *old.buffers()] for side in t.shape), default=0)
    return size(new, False) <= size(old, False) and size(new, True) <= max(size(old, True), 4 * longest)


def _check_fit(file: _File, targets: Mapping[str, Tensor], larger: list[str]) -> None:
    """ValueError unless names, shapes and kinds of numbers agree."""
    names = {*file.tensors, *file.same}
    faults, shapes = [], []
    if missing := sorted(targets.keys() - names):
        faults.append(f"it lacks {_some(missing)}")
    if unexpected := sorted(names - targets.keys()):
        faults.append(f"the model lacks {_some(unexpected)}")
    for name in sorted(targets.keys() & names):
        source, target = file.same.get(name, name), targets[name]
        shape, dtype = file.tensors[source].shape, file.tensors[source].values.dtype
        if source in file.complex:
            shape, dtype = shape[:-1], COMPLEX[dtype]
        if shape != tuple(target.shape):
            shapes.append(f"{short(name)} is {short(shape)} in the file and {tuple(target.shape)} in the model")
        elif dtype != target.dtype and not (dtype.is_floating_point and target.is_floating_point()):
            faults.append(f"{short(name)} is {dtype} in the file and {target.dtype} in the model")
        elif any(step == 0 and side > 1 for step, side in zip(target.stride(), target.shape, strict=True)):
            faults.append(f"{short(name)} of the model is an expanded tensor and cannot be written")
        elif target.is_inference() and not torch.is_inference_mode_enabled():
            faults.append(f"{short(name)} of the model was made in inference mode and cannot be written")
    faults += [*shapes[:3], f"and {len(shapes) - 3:,} more"] if len(shapes) > 3 else shapes
    if larger:
        faults.append(f"{_some(larger)} is larger in the file, and a layer is only replaced by a smaller one")
    if faults:
        raise ValueError("; ".join(faults))


def _check_values(
    file: _File, targets: Mapping[str, Tensor], positions: Mapping[str, tuple[Array, Array] | None]
) -> None:
    """ValueError if a value becomes infinite in the model, or one tensor of the model would get two contents."""
    first: dict[tuple[Any, ...], str] = {}
    for name, target in targets.items():
        source = file.same.get(name, name)
        values = file.tensors[source].values
        if target.is_floating_point() and values.dtype != target.dtype and (fault := _too_large(values, target.dtype)):
            raise ValueError(f"{name} {fault}")
        other = first.setdefault(_identity(target), source)
        if other != source:
            one, two = (_integers(file.tensors[key].expand(positions[key])) for key in (other, source))
            if not np.array_equal(one, two):
                raise ValueError(f"{short(other)} and {short(source)} are one tensor in the model and two in the file")


def _materialise(replaced: Mapping[str, nn.Module], standing: Mapping[str, Place], example: Tensor | None) -> None:
    """Give the new modules memory, on the device and with the dtype, mode and `requires_grad` of the old ones."""
    for module, old in {id(m): (m, standing[path].module) for path, m in replaced.items()}.values():
        like = next((t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point()), example)
        if like is not None:
            module.to(like.dtype if like.is_floating_point() else None).to_empty(device=like.device)
        flags = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(flags.get(name, any(flags.values())))
        if type(old) is type(module) or isinstance(old, nn.MultiheadAttention):
            for name in FROM_MODEL:
                if hasattr(old, name):
                    setattr(module, name, getattr(old, name))
        module.train(old.training)
