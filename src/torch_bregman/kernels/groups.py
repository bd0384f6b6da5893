"""θ = δ·shrink(v) group by group: groups without a live weight are read for their norm and not written.

A tensor in memory is read as rows of `inner` entries, and row r belongs to group r mod `groups`. With one row per group
("contiguous": rows, filters, kernels) the norm, the factor and the write follow each other while the row is in cache.
Else (columns, channels: `outer` slices of all groups) the norms come first, and then only live groups are written.
FACTORS keeps what every group was last multiplied with: 0 where it is dead.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray

from .step import ROTATION, compiled, inlined
from .vector import (
    LINE_BYTES,
    claim,
    clamp,
    denormals_are_zero,
    fma,
    load,
    pointer,
    prefetch,
    some,
    splat,
    store,
    store_if,
)

COUNTER, OUTER, GROUPS, INNER, CHUNK, V, THETA, SUMS, FACTORS, LIST, LISTED, NUMBERS, LOOK, EDITED = range(14)
SOFT, SHRINK, DELTA = range(3)
AHEAD = 16  # groups


@inlined
def _soft(x, soft):
    return x - min(max(x, -soft), soft)


@inlined
def _square(v, start, inner, soft, lane):
    """Σ soft(v)² of one row."""
    lanes = lane.size
    total = v.dtype.type(0)
    whole = inner // lanes * lanes
    if whole:
        low, high, sums = splat(-soft), splat(soft), splat(total)
        for k in range(0, whole, lanes):
            x = load(v, start + k)
            x = x - clamp(x, low, high)
            sums = fma(x, x, sums)
        store(lane, 0, sums)
        for k in range(lanes):
            total += lane[k]
    for k in range(whole, inner):
        x = _soft(v[start + k], soft)
        total += x * x
    return total


@inlined
def _short_squares(v, start, inner, count, soft, buffer, sums):
    """sums[g] = Σ soft(v)² of `count` <= lanes rows that are shorter than a line: line by line, then added up."""
    lanes = sums.size
    low, high = splat(-soft), splat(soft)
    whole = count * inner // lanes * lanes
    for k in range(0, whole, lanes):
        x = load(v, start + k)
        x = x - clamp(x, low, high)
        store(buffer, k, x * x)
    for k in range(whole, count * inner):
        x = _soft(v[start + k], soft)
        buffer[k] = x * x
    if inner == 9:  # 3×3 kernels: a constant, for LLVM to unroll
        for g in range(count):
            total = buffer[g * 9]
            for k in range(1, 9):
                total += buffer[g * 9 + k]
            sums[g] = total
        return
    for g in range(count):
        total = buffer[g * inner]
        for k in range(g * inner + 1, (g + 1) * inner):
            total += buffer[k]
        sums[g] = total


@inlined
def _write(p, v, start, inner, factor, soft, delta, lanes):
    whole = inner // lanes * lanes
    low, high, factors, deltas = splat(-soft), splat(soft), splat(factor), splat(delta)
    for k in range(start, start + whole, lanes):
        x = load(v, k)
        store(p, k, deltas * ((x - clamp(x, low, high)) * factors))
    for k in range(start + whole, start + inner):
        p[k] = delta * (_soft(v[k], soft) * factor)


@inlined
def _differs(p, v, start, inner, factor, soft, delta, lanes):
    whole = inner // lanes * lanes
    low, high, factors, deltas = splat(-soft), splat(soft), splat(factor), splat(delta)
    found = False
    for k in range(start, start + whole, lanes):
        x = load(v, k)
        found |= some(deltas * ((x - clamp(x, low, high)) * factors) != load(p, k)) != 0
    for k in range(start + whole, start + inner):
        found |= delta * (_soft(v[k], soft) * factor) != p[k]
    return found


@functools.cache
def squares(name):
    """SUMS[chunk, group] = Σ soft(v)² over the CHUNK outer slices of a chunk, for groups that come again and again."""
    dtype = np.dtype(name)
    width, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (14,), np.int64)
        outer, groups, inner, size = head[OUTER], head[GROUPS], head[INNER], head[CHUNK]
        soft = dtype.type(carray(pointer(head[NUMBERS]), (3,), np.float64)[SOFT])
        low, high, lane, buffer = splat(-soft), splat(soft), np.zeros(lanes, dtype), np.zeros(lanes * lanes, dtype)
        whole = groups // lanes * lanes
        word = denormals_are_zero(-1)
        while True:
            chunk = claim(head)
            if chunk * size >= outer:
                break
            sums = carray(pointer(head[SUMS] + chunk * groups * width), (groups,), dtype)
            sums[:] = 0
            for o in range(chunk * size, min((chunk + 1) * size, outer)):
                v = carray(pointer(head[V] + o * groups * inner * width), (groups * inner,), dtype)
                if inner == 1:
                    for k in range(0, whole, lanes):
                        x = load(v, k)
                        x = x - clamp(x, low, high)
                        store(sums, k, fma(x, x, load(sums, k)))
                    for k in range(whole, groups):
                        x = _soft(v[k], soft)
                        sums[k] += x * x
                elif inner < lanes:
                    for first in range(0, groups, lanes):
                        count = min(lanes, groups - first)
                        _short_squares(v, first * inner, inner, count, soft, buffer, lane)
                        for g in range(count):
                            sums[first + g] += lane[g]
                else:
                    for group in range(groups):
                        sums[group] += _square(v, group * inner, inner, soft, lane)
        denormals_are_zero(word)

    return compiled(loop)


@functools.cache
def shrink(name):
    """Write θ. One outer slice: every group gets its factor here. Several: FACTORS has them, LIST the groups to write.

    With inner = 1 LIST has a byte per cache line instead, −1 where a group of it is to be written.
    """
    dtype = np.dtype(name)
    width, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize
    tiny = np.finfo(dtype).tiny

    def loop(data):
        head = carray(data, (14,), np.int64)
        outer, groups, inner, size = head[OUTER], head[GROUPS], head[INNER], head[CHUNK]
        numbers = carray(pointer(head[NUMBERS]), (3,), np.float64)
        soft, threshold, delta = dtype.type(numbers[SOFT]), dtype.type(numbers[SHRINK]), dtype.type(numbers[DELTA])
        low, high, deltas = splat(-soft), splat(soft), splat(delta)
        lane, buffer = np.zeros(lanes, dtype), np.zeros(lanes * lanes, dtype)
        surely_dead = threshold * threshold * dtype.type(1 - 1e-5)  # saves most groups the root
        factors = carray(pointer(head[FACTORS]), (groups,), dtype)
        rows = carray(pointer(head[LIST]), (head[LISTED],), np.int64)
        lines = carray(pointer(head[LIST]), (head[LISTED],), np.int8)
        spare = np.zeros(lanes, dtype)
        word = denormals_are_zero(-1)
        while True:
            chunk = claim(head)
            start = chunk * size
            if start >= (groups if outer == 1 else outer):
                break
            if outer == 1:
                stop = min(start + size, groups)
                v = carray(pointer(head[V]), (groups * inner,), dtype)
                p = carray(pointer(head[THETA]), (groups * inner,), dtype)
                step = lanes if inner < lanes else 1
                for first in range(start, stop, step):
                    count = min(step, stop - first)
                    if inner < lanes:
                        _short_squares(v, first * inner, inner, count, soft, buffer, lane)
                    else:
                        lane[0] = _square(v, first * inner, inner, soft, buffer[:lanes])
                    for group in range(first, first + count):
                        square = lane[group - first]
                        factor = dtype.type(0)
                        if not square <= surely_dead:
                            norm = np.sqrt(square)
                            factor = max(norm - threshold, factor) / max(norm, dtype.type(tiny))
                            if norm != norm:
                                factor = norm
                        if factor != 0 or factors[group] != 0:
                            _write(p, v, group * inner, inner, factor, soft, delta, lanes)
                            factors[group] = factor
                continue
            for o in range(start, min(start + size, outer)):
                v = carray(pointer(head[V] + o * groups * inner * width), (groups * inner,), dtype)
                p = carray(pointer(head[THETA] + o * groups * inner * width), (groups * inner,), dtype)
                if inner == 1:
                    whole = groups // lanes * lanes
                    for k in range(0, whole, lanes):
                        x = load(v, k)
                        x = deltas * ((x - clamp(x, low, high)) * load(factors, k))
                        store_if(p, k, lines[k // lanes], spare, x)
                    for k in range(whole, groups):
                        p[k] = delta * (_soft(v[k], soft) * factors[k])
                    continue
                for q in range(rows.size):
                    if q + AHEAD < rows.size:
                        prefetch(v, rows[q + AHEAD] * inner)
                        prefetch(p, rows[q + AHEAD] * inner)
                    _write(p, v, rows[q] * inner, inner, factors[rows[q]], soft, delta, lanes)
        denormals_are_zero(word)

    return compiled(loop)


@functools.cache
def look(name):
    """EDITED ← 1 if a θ is not what FACTORS says. Dead groups are read with LOOK = −1, else one chunk in ROTATION."""
    dtype = np.dtype(name)
    width, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (14,), np.int64)
        outer, groups, inner, size = head[OUTER], head[GROUPS], head[INNER], head[CHUNK]
        numbers = carray(pointer(head[NUMBERS]), (3,), np.float64)
        soft, delta = dtype.type(numbers[SOFT]), dtype.type(numbers[DELTA])
        low, high, deltas = splat(-soft), splat(soft), splat(delta)
        factors = carray(pointer(head[FACTORS]), (groups,), dtype)
        rows = carray(pointer(head[LIST]), (head[LISTED],), np.int64)
        found, differs = False, low > high  # high >= low: nothing yet
        word = denormals_are_zero(-1)
        while True:
            chunk = claim(head)
            start = chunk * size
            if start >= (groups if outer == 1 else outer):
                break
            everything = head[LOOK] < 0 or chunk % ROTATION == head[LOOK] % ROTATION
            if outer == 1:
                v = carray(pointer(head[V]), (groups * inner,), dtype)
                p = carray(pointer(head[THETA]), (groups * inner,), dtype)
                for group in range(start, min(start + size, groups)):
                    if everything or factors[group] != 0:
                        found |= _differs(p, v, group * inner, inner, factors[group], soft, delta, lanes)
                continue
            for o in range(start, min(start + size, outer)):
                v = carray(pointer(head[V] + o * groups * inner * width), (groups * inner,), dtype)
                p = carray(pointer(head[THETA] + o * groups * inner * width), (groups * inner,), dtype)
                if inner == 1:
                    whole = groups // lanes * lanes
                    for k in range(0, whole, lanes):
                        x = load(v, k)
                        x = deltas * ((x - clamp(x, low, high)) * load(factors, k))
                        differs = differs | (x != load(p, k))
                    for k in range(whole, groups):
                        found |= delta * (_soft(v[k], soft) * factors[k]) != p[k]
                    continue
                for q in range(groups if everything else rows.size):
                    k = q if everything else rows[q]
                    if q + AHEAD < rows.size:
                        prefetch(v, rows[q + AHEAD] * inner)
                        prefetch(p, rows[q + AHEAD] * inner)
                    found |= _differs(p, v, k * inner, inner, factors[k], soft, delta, lanes)
        found |= some(differs) != 0
        if found:
            head[EDITED] = 1
        denormals_are_zero(word)

    return compiled(loop)
