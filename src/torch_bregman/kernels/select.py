"""The k-th largest |v| in two passes: roughly where it lies, then the few values there. Nothing else is sorted."""

from __future__ import annotations

import functools

import numpy as np
from numba import carray

from .step import compiled
from .vector import LINE_BYTES, claim, count, load, pointer, splat

CHUNK = 1 << 16
COUNTER, CHUNKS, TENSORS, JOBS, STARTS, NEAR, ROOM, FOUND, ABOVE = range(9)
SIZE, V, LOW, HIGH, UNIT = range(5)
SLOTS = 1 << 14
SHIFT = 17  # of the bits of a float32: the exponent and six bits of the mantissa are left, steps of 1.6 %


@functools.cache
def histogram(name):
    """How many |v|/UNIT fall into each slot, the float32 with its last SHIFT bits cut off; a row of NEAR per thread.

    FOUND counts the threads. Jobs as for `band`.
    """
    dtype = np.dtype(name)
    width = dtype.itemsize

    def loop(data):
        head = carray(data, (9,), np.int64)
        tensors = head[TENSORS]
        jobs = carray(pointer(head[JOBS]), (tensors, 5), np.float64)
        starts = carray(pointer(head[STARTS]), (tensors + 1,), np.int64)
        found = carray(pointer(head[FOUND]), (1,), np.int64)
        mine = carray(pointer(head[NEAR] + claim(found) * SLOTS * 8), (SLOTS,), np.int64)
        t = 0
        while True:
            chunk = claim(head)
            if chunk >= head[CHUNKS]:
                break
            while starts[t + 1] <= chunk:
                t += 1
            begin = (chunk - starts[t]) * CHUNK
            n = min(CHUNK, np.int64(jobs[t, SIZE]) - begin)
            v = carray(pointer(np.int64(jobs[t, V]) + begin * width), (n,), dtype)
            scale = dtype.type(1 / jobs[t, UNIT])
            for k in range(n):
                mine[np.float32(abs(v[k]) * scale).view(np.int32) >> SHIFT] += 1

    return compiled(loop)


@functools.cache
def band(name):
    """ABOVE ← how many |v| > HIGH; NEAR ← the |v|/UNIT of those in (LOW, HIGH], in any order, FOUND of them.

    One row of JOBS (float64; addresses are exact in it) per tensor.
    """
    dtype = np.dtype(name)
    width, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (9,), np.int64)
        tensors = head[TENSORS]
        jobs = carray(pointer(head[JOBS]), (tensors, 5), np.float64)
        starts = carray(pointer(head[STARTS]), (tensors + 1,), np.int64)
        near = carray(pointer(head[NEAR]), (head[ROOM],), np.float64)
        found = carray(pointer(head[FOUND]), (1,), np.int64)
        above = carray(pointer(head[ABOVE]), (head[CHUNKS],), np.int64)
        t = 0
        while True:
            chunk = claim(head)
            if chunk >= head[CHUNKS]:
                break
            while starts[t + 1] <= chunk:
                t += 1
            begin = (chunk - starts[t]) * CHUNK
            n = min(CHUNK, np.int64(jobs[t, SIZE]) - begin)
            v = carray(pointer(np.int64(jobs[t, V]) + begin * width), (n,), dtype)
            low, high = dtype.type(jobs[t, LOW]), dtype.type(jobs[t, HIGH])
            inner, outer = (splat(-low), splat(low)), (splat(-high), splat(high))
            total = 0
            whole = n // lanes * lanes
            for i in range(0, whole, lanes):
                x = load(v, i)
                beyond = (x > outer[1]) | (x < outer[0])
                reached = (x > inner[1]) | (x < inner[0])
                total += count(beyond)
                if count(reached) != count(beyond):
                    for k in range(i, i + lanes):
                        size = abs(v[k])
                        if size > low and not size > high:
                            place = claim(found)
                            if place < head[ROOM]:
                                near[place] = size / jobs[t, UNIT]
            for k in range(whole, n):
                size = abs(v[k])
                if size > high:
                    total += 1
                elif size > low:
                    place = claim(found)
                    if place < head[ROOM]:
                        near[place] = size / jobs[t, UNIT]
            above[chunk] = total

    return compiled(loop)
