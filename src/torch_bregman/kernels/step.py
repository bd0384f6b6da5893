"""One pass over memory: move v along the gradient and write θ = prox(v) where it changes.

What moves is memory, so what counts is which cache lines are touched. g, v and the moments are read and written once.
Of θ only the lines that hold a live weight are read and written: the others are zero and stay zero. A byte per line
remembers which they are, so that they can be asked for `AHEAD` lines early; no hardware guesses that.

A weight changed from outside is seen where its line is read. Lines without a live weight are read too in a full look
(`LOOK`: small tensors, and whenever torch's version counter moved), and otherwise one chunk in `ROTATION` per step, in
turn; what is not seen is not overwritten either.
"""

from __future__ import annotations

import functools

import numba
import numpy as np
from numba import carray

from .columns import (
    ADAM,
    ADAMW,
    ADDRESSES,
    BETA1,
    BETA2,
    BOTH,
    DECAY,
    DELTA,
    DELTA0,
    DUAL,
    EPS,
    FIRST,
    GRAD,
    HIGH,
    HIGH0,
    HOLD,
    LOW,
    LOW0,
    LR,
    NESTEROV,
    NUMBERS,
    PACE,
    PAPER,
    PLAIN,
    PRIMAL,
    ROOT,
    SECOND,
    SGD,
    SHRINK,
    SIGN,
    SIZE,
    THETA,
    V,
)  # fmt: skip
from .vector import (
    LINE_BYTES,
    claim,
    clamp,
    denormals_are_zero,
    fma,
    load,
    load_if,
    pointer,
    prefetch_if,
    select,
    some,
    splat,
    sqrt,
    store,
    store_if,
)

CHUNKS = 1 << 13, 1 << 18  # entries that a thread takes at a time, at least and at most
AHEAD = 32  # lines
ROTATION = 64

# One row per tensor: addresses and flags (int64; columns.py has the first ones), and numbers (float64).
LIVE, LOOK, EDITED = range(len(ADDRESSES), len(ADDRESSES) + 3)
JOB = len(ADDRESSES) + 3
COLUMNS = len(NUMBERS)
# The head: the shared counter, then what all tensors have in common.
COUNTER, CHUNK, COUNT, TENSORS, PHASE, JOBS, TABLE, STARTS = range(8)

_options = {"error_model": "numpy"}
inlined = numba.njit(forceinline=True, **_options)


@inlined
def _moved(rule, x, g, m, s, i, a, b, b2, w2, eps, root, pace):
    """The new v (or θ) of one line, and the moments along with it; operations and order are torch's, bar the root."""
    if rule == PLAIN:
        return fma(a, g, x)
    if rule == PAPER:
        y = fma(a, g, load(m, i) * b)
        store(m, i, y)
        return x - y
    if rule == SGD:
        y = load(m, i) * b + g
        store(m, i, y)
        return fma(a, y, x)
    if rule == NESTEROV:
        y = load(m, i) * b + g
        store(m, i, y)
        return fma(a, fma(b, y, g), x)
    if rule >= ADAM:
        y = load(m, i)
        y = fma(a, g - y, y)
        z = fma(w2 * g, g, load(s, i) * b2)
        store(m, i, y)
        store(s, i, z)
        return x + pace * y / fma(sqrt(z), root, eps)
    return x


@inlined
def _shrunk(x, low, high, one_sided, lowest, infinite):
    """x − clamp(x, low, high); with low = −∞ an infinite x becomes zero, and not ∞ − ∞."""
    if one_sided:
        x = clamp(x, lowest, infinite)
    return x - clamp(x, low, high)


@inlined
def _followed(x, theta, expected, low, high, delta0, delta, inside, zero):
    """v ← θ/δ + p, p ∈ ∂J(θ); where θ is zero v keeps what it remembers, a hair inside the threshold."""
    memory = clamp(x - expected / delta0, low, high)
    end = select(theta > zero, high, select(low < zero - high, memory, low))
    return select(theta != zero, theta / delta + end, inside * memory)


@inlined
def _lines(rule, mode, count, p, g, v, m, s, live, c, look, spare, flags):
    """`count` lines of one tensor; returns 1 if a weight was found that the last step did not write.

    `live`: a byte per line, −1 where the last step left a weight in it.
    """
    T = p.dtype.type
    lanes = LINE_BYTES // p.itemsize
    low0, high0, delta0 = splat(T(c[LOW0])), splat(T(c[HIGH0])), splat(T(c[DELTA0]))
    low, high, delta = splat(T(c[LOW])), splat(T(c[HIGH])), splat(T(c[DELTA]))
    b, b2, w2 = splat(T(c[BETA1])), splat(T(c[BETA2])), splat(T(1 - c[BETA2]))
    eps, root, pace = splat(T(c[EPS])), splat(T(1 / c[ROOT])), splat(T(c[PACE]))
    a = splat(T((1 - c[BETA1]) * c[LR] if rule == PAPER else (1 - c[BETA1] if rule >= ADAM else -c[LR])))
    shrink = splat(T(-c[SHRINK]))
    decay, sign, zero = splat(T(c[DECAY])), splat(T(c[SIGN])), splat(T(0))
    inside = splat(T(1 - 4 * np.finfo(p.dtype).eps))
    one_sided = c[LOW] == -np.inf
    lowest, infinite = splat(T(np.finfo(p.dtype).min)), splat(T(np.inf))
    edited, plain = 0, c[DECAY] == 0 and c[SIGN] > 0
    for line in range(count):
        i = line * lanes
        x = load(p, i) if mode == PRIMAL else load(v, i)
        old = x
        if mode == BOTH:
            prefetch_if(p, i + AHEAD * lanes, live[line + AHEAD], spare)
            seen = live[line] | look
            expected = delta0 * _shrunk(x, low0, high0, one_sided, lowest, infinite)
            theta = load_if(p, i, seen, spare)
            changed = expected != theta
            if some(changed):  # a line that was not read is dead, and both sides are zero
                x = select(changed, _followed(x, theta, expected, low, high, delta0, delta, inside, zero), x)
                edited, seen = 1, -1
        before = x
        if rule != HOLD:
            d = load(g, i)
            if not plain:
                d = fma(decay, load(p, i), sign * d)
            if rule == ADAMW:
                x = fma(shrink, load(p, i), x)
            x = _moved(rule, x, d, m, s, i, a, b, b2, w2, eps, root, pace)
        if mode == PRIMAL:
            x = _shrunk(x, low, high, one_sided, lowest, infinite)
            store_if(p, i, flags[some((x != zero) | (old != zero))], spare[lanes:], x)
        else:
            store(v, i, x)
            if mode == BOTH:
                theta = delta * _shrunk(x, low, high, one_sided, lowest, infinite)
                alive = flags[some(theta != zero)]
                live[line] = alive
                # Where to write must not wait for the new v, or everything after it waits as well; that a line comes
                # alive is rare enough for a branch.
                store_if(p, i, seen, spare[lanes:], theta)
                if alive & ~seen:
                    there = load(p, i)
                    changed = there != zero
                    if some(changed):  # changed from outside while nobody looked
                        fresh = _followed(before, there, zero, low, high, delta0, delta, inside, zero)
                        x = select(changed, fresh + (x - before), x)
                        store(v, i, x)
                        theta = delta * _shrunk(x, low, high, one_sided, lowest, infinite)
                        edited = 1
                    store(p, i, theta)
    return edited


@inlined
def _padded(into, n, array, there):
    """The first line of `into` with the n entries of `array` if it is there, and zeros."""
    into[:] = 0
    if there:
        into[:n] = array


@inlined
def _unpadded(array, n, source, there):
    if there:
        array[:] = source[:n]


@functools.cache
def step(name, rule, mode):
    """The compiled loop for one dtype, rule and mode; its argument is the address of the head."""
    dtype = np.dtype(name)
    width, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (8,), np.int64)
        tensors, size = head[TENSORS], head[CHUNK]
        jobs = carray(pointer(head[JOBS]), (tensors, JOB), np.int64)
        numbers = carray(pointer(head[TABLE]), (tensors, COLUMNS), np.float64)
        starts = carray(pointer(head[STARTS]), (tensors + 1,), np.int64)
        room, line = np.zeros(8 * lanes, dtype), np.zeros((5, lanes), dtype)
        spare = room[(-room.ctypes.data % LINE_BYTES) // width :]
        flags = np.zeros(2, np.int64)
        flags[1] = -1
        t, word = 0, denormals_are_zero(-1)
        while True:
            chunk = claim(head)
            if chunk >= head[COUNT]:
                break
            while starts[t + 1] <= chunk:
                t += 1
            job = jobs[t]
            begin = (chunk - starts[t]) * size
            n = min(size, job[SIZE] - begin)
            at = begin * width
            p = carray(pointer(job[THETA] + at), (n,), dtype)
            g = carray(pointer(job[GRAD] + at), (n,), dtype)
            v = carray(pointer(job[V] + at), (n,), dtype)
            m = carray(pointer(job[FIRST] + at), (n,), dtype)
            s = carray(pointer(job[SECOND] + at), (n,), dtype)
            live = carray(pointer(job[LIVE] + begin // lanes), (n // lanes + 1 + AHEAD,), np.int8)
            whole = n // lanes
            rest = n - whole * lanes
            for part in range(2):  # whole lines, then what is left, padded to a line
                if part == 0:
                    count = whole
                    look = -np.int64(job[LOOK] != 0 or (chunk + head[PHASE]) % ROTATION == 0)
                    q, h, u, k, r = p, g, v, m, s
                else:
                    count, look = np.int64(rest > 0), -1
                    q, h, u, k, r = line[0], line[1], line[2], line[3], line[4]
                    e = n - rest
                    _padded(q, rest, p[e:], True)
                    _padded(h, rest, g[e:], rule != HOLD)
                    _padded(u, rest, v[e:], mode != PRIMAL)
                    _padded(k, rest, m[e:], rule >= PAPER)
                    _padded(r, rest, s[e:], rule >= ADAM)
                if _lines(rule, mode, count, q, h, u, k, r, live[part * whole :], numbers[t], look, spare, flags):
                    job[EDITED] = 1
                if part == 1:
                    _unpadded(p[e:], rest, q, mode != DUAL)
                    _unpadded(v[e:], rest, u, mode != PRIMAL)
                    _unpadded(m[e:], rest, k, rule >= PAPER)
                    _unpadded(s[e:], rest, r, rule >= ADAM)

        denormals_are_zero(word)

    return compiled(loop)


def compiled(loop):
    """`loop` as a C function of one pointer, kept in Numba's file cache where there is a place for it."""
    try:
        return numba.cfunc("void(voidptr)", cache=True, **_options)(loop)
    except RuntimeError:  # nowhere to write the cache
        return numba.cfunc("void(voidptr)", **_options)(loop)


def function(python):
    """`python` compiled at its first call, kept in Numba's file cache where there is a place for it."""
    try:
        return numba.njit(cache=True, nogil=True, **_options)(python)
    except RuntimeError:
        return numba.njit(nogil=True, **_options)(python)
