"""`multilevel.off_support.take_missed_steps` in one pass over v, the moments and the gradient."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from .step import compiled
from .vector import LINE_BYTES, claim, clamp, denormals_are_zero, fma, load, pointer, select, splat, sqrt, store

CHUNK = 1 << 14  # entries
COUNTER, SIZE, V, FIRST, SECOND, GRAD, NUMBERS = range(7)
LANES = {"float32": LINE_BYTES // 4, "float64": LINE_BYTES // 8}


@functools.cache
def take_missed_steps(name: str) -> Any:
    """The compiled loop for one dtype, over whole cache lines; its argument is the address of the head."""
    dtype, lanes = np.dtype(name), LANES[name]

    def loop(data):
        head = carray(data, (7,), np.int64)
        n = head[SIZE]
        v, first = carray(pointer(head[V]), (n,), dtype), carray(pointer(head[FIRST]), (n,), dtype)
        second, grad = carray(pointer(head[SECOND]), (n,), dtype), carray(pointer(head[GRAD]), (n,), dtype)
        c = carray(pointer(head[NUMBERS]), (12,), dtype)
        keep, b2, eps, pace = splat(c[0]), splat(c[1]), splat(c[2]), splat(c[3])
        new, w2 = splat(dtype.type(1) - c[0]), splat(dtype.type(1) - c[1])
        sign, w1, unbias1, unbias2 = splat(c[4]), splat(c[5]), splat(c[6]), splat(c[7])
        noise, scale, low, high = splat(c[8]), splat(c[9]), splat(c[10]), splat(c[11])
        zero, one = splat(dtype.type(0)), splat(dtype.type(1))
        word = denormals_are_zero(-1)
        while True:
            begin = claim(head) * CHUNK
            if begin >= n:
                break
            for i in range(begin, min(begin + CHUNK, n), lanes):
                g = load(grad, i)
                square = g * g
                z = fma(new, square, load(second, i) * keep)
                store(second, i, z)
                m = load(first, i)
                mean = fma(w1, sign * g - m, m) * unbias1
                z = fma(w2, square, z * b2) * unbias2
                share = clamp((mean * mean / select(z > zero, z, one) - noise) * scale, zero, one)
                store(v, i, clamp(fma(pace * share, mean / (sqrt(z) + eps), load(v, i)), low, high))
        denormals_are_zero(word)

    return compiled(loop)
