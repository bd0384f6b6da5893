"""Where the kept values of a tensor are: a bitmask, or the gaps between them in Rice codes.

A bitmask has one bit per entry, the lowest bit of a byte first. The gaps are g_k = i_k − i_{k−1} − 1, the zeros before
the k-th kept entry: first the low b bits of all of them as b planes of ⌈kept/8⌉ bytes, then ⌊g_k/2^b⌋ zeros and a one
for each k. With the best b this takes at most log2(n/kept) + 2 bits per kept entry whatever the pattern, and on a
random pattern about 0.1 more than its entropy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

MASK = -1  # the code of a bitmask; of gaps it is b

Array = np.ndarray[Any, np.dtype[Any]]


def encode(mask: Array) -> tuple[int, Array]:
    """(code, pattern) of where the flat bool array `mask` is true: the smaller of gaps and bitmask."""
    kept, n = int(np.count_nonzero(mask)), len(mask)
    if kept == 0:
        return 0, np.empty(0, np.uint8)
    if 2 * kept >= n:  # gaps would need a bit per entry too
        return MASK, np.packbits(mask, bitorder="little")
    index = np.flatnonzero(mask)
    gaps = np.diff(index, prepend=-1) - 1
    bits, high, total = 0, gaps, int(gaps.sum())
    while True:  # a further low bit costs one bit per gap and saves zeros, fewer each time
        half = high >> 1
        saved = total - int(half.sum())
        if saved <= kept:
            break
        bits, high, total = bits + 1, half, total - saved
    if bits * _bytes(kept) + _bytes(kept + total) >= _bytes(n):
        return MASK, np.packbits(mask, bitorder="little")
    unary = np.zeros(kept + total, np.uint8)
    unary[np.cumsum(high) + np.arange(kept)] = 1
    planes = [np.packbits((gaps >> j & 1).astype(np.uint8), bitorder="little") for j in range(bits)]
    return bits, np.concatenate([*planes, np.packbits(unary, bitorder="little")])


def decode(pattern: Array, code: int, kept: int, n: int) -> Array:
    """The `kept` ascending positions in 0 … n − 1, or a mask of n bools. ValueError if the pattern is none of these.

    Memory: at most a byte per entry and 40 per kept one, whatever the pattern says.
    """
    if code == MASK:
        if len(pattern) != _bytes(n) or (n % 8 and pattern[-1] >> n % 8):
            raise ValueError("its bitmask is not of its size")
        mask = np.unpackbits(pattern, count=n, bitorder="little").view(np.bool_)
        if np.count_nonzero(mask) != kept:
            raise ValueError(f"its bitmask keeps {np.count_nonzero(mask):,} entries, but there are {kept:,} values")
        return mask
    if kept == 0:
        if len(pattern) or code:
            raise ValueError("its pattern keeps entries, but there are no values")
        return np.empty(0, np.int64)
    plane = _bytes(kept)
    unary = pattern[code * plane :]
    if not (code < n.bit_length() and 1 <= len(unary) <= _bytes(kept + ((n - kept) >> code)) and unary[-1]):
        raise ValueError("its gaps are not of its size")
    ones = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if len(ones) != kept:
        raise ValueError(f"it has {len(ones):,} gaps, but there are {kept:,} values")
    gaps = (np.diff(ones, prepend=-1) - 1) << code
    for j in range(code):
        low = pattern[j * plane : (j + 1) * plane]
        if kept % 8 and low[-1] >> kept % 8:
            raise ValueError("its gaps have bits beyond their end")
        gaps |= np.unpackbits(low, count=kept, bitorder="little").astype(np.int64) << j
    index = np.cumsum(gaps + 1) - 1
    if index.min() < 0 or index.max() >= n:
        raise ValueError(f"it has positions beyond its {n:,} entries")
    return index


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
