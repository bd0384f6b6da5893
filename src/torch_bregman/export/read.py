"""Reading a sparse file: everything in it is checked before it is used; see file.py for what is in it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from . import descriptions
from .descriptions import DEPTH, Description, is_count, short
from .file import (
    COMPLEX,
    HEADER_LIMIT,
    KEYS,
    METADATA,
    MOST,
    NO_DIGEST,
    PATTERNS,
    VERSION,
    Pathlike,
    integers,
    negative_zero,
    where_kept,
)
from .patterns import MASK, Array, decode


class StoredTensor(NamedTuple):
    """A tensor of the file, not expanded yet: all its values (`code` None), or the kept ones and their pattern."""

    shape: tuple[int, ...]
    values: Tensor
    code: int | None = None
    pattern: Array = np.empty(0, np.uint8)
    negative_code: int = 0  # of the −0.0
    negative: Array = np.empty(0, np.uint8)
    negatives: int = 0

    def expand(self, where: tuple[Array, Array] | None) -> Tensor:
        """The dense tensor, pairs of reals where it is complex. `where`: see `SparseFile.where`."""
        if where is None:
            return self.values
        bits = integers(self.values)
        dense = np.zeros(math.prod(self.shape), bits.dtype)
        dense[where[0]] = bits
        dense[where[1]] = negative_zero(bits)
        return torch.from_numpy(dense).view(self.values.dtype).reshape(self.shape)


@dataclass(frozen=True)
class SparseFile:
    path: Path
    size: int  # bytes
    header: dict[str, Any]
    tensors: dict[str, StoredTensor]
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

    def inside(self, names: Collection[str]) -> SparseFile:
        """As saved without a wrapper, which earlier versions wrote down too, where `names` has it not."""
        own = {*self.tensors, *self.same} - {"n_averaged"}  # which an average holds beside the network
        start = "module."
        if not own or any(name.startswith(start) for name in names) or not all(name.startswith(start) for name in own):
            return self

        def cut(of: dict[str, Any]) -> dict[str, Any]:
            return {name.removeprefix(start): value for name, value in of.items() if name.startswith(start)}

        same = {name: target.removeprefix(start) for name, target in cut(self.same).items()}
        pairs = frozenset(name.removeprefix(start) for name in self.complex)
        inner = replace(self, tensors=cut(self.tensors), same=same, complex=pairs, modules=cut(self.modules))
        return inner.inside(names)


def some(names: list[str]) -> str:
    return ", ".join(map(short, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def read_file(path: Path, limit: int | None) -> SparseFile:
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


def _parse(path: Path, size: int, header: dict[str, Any], payload: dict[str, Tensor]) -> SparseFile:
    """What the header says about the tensors, checked. ValueError saying what is wrong, without the file."""
    if not header.keys() <= KEYS:
        raise ValueError(f"its description has the unknown {some(sorted(header.keys() - KEYS))}")
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
        raise ValueError(f"it describes {some(unknown)}, which it does not hold")
    tensors: dict[str, StoredTensor] = {}
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
        tensors[name] = StoredTensor(tuple(shape), values, code, pattern, negative_code, negative, negatives)
    if len(rest):
        raise ValueError(f"it has {len(rest):,} bytes of patterns too many")
    for name, values in payload.items():
        tensors.setdefault(name, StoredTensor(tuple(values.shape), values))
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
        if where.count(".") > DEPTH or not descriptions.is_description(description):
            raise ValueError(f"the module {short(where)} is described as {short(description)}")
    return SparseFile(path, size, header, tensors, same, frozenset(pairs), modules)


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
    file = read_file(Path(path), limit)
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
        nonzero, _ = where_kept(integers(stored.values), stored.values.is_floating_point())
        rows[name] = {"shape": tuple(found[name].shape), "dtype": found[name].dtype, "encoding": encoding,
                      "kept": int(np.count_nonzero(nonzero))}  # fmt: skip
    found.update({name: found[target] for name, target in file.same.items()})
    kept, size = file.header.get("kept", 0), file.header.get("size", 0)
    return found, {"version": VERSION, "kept": kept, "size": size, "density": kept / size if size else math.nan,
                   "tensors": rows, "same": file.same, "modules": file.modules}  # fmt: skip
