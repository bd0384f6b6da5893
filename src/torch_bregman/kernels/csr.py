"""Products with a sparse matrix W in CSR form, for activations that lie batch-last: X [in, batch], Y [out, batch].

.. code-block:: text

    product    Y = W X + b                      for every row the sum of a few rows of X
    sampled    g_k = Σ_b G[row k, b] X[col k, b]   the gradient of the live weights, and of no other

The gradient to the input is the product with Wᵀ, whose pattern is kept beside that of W. A row of X is read in whole
vectors, and the sums of a row of Y stay in registers while its weights pass by.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from .step import compiled, inlined
from .vector import LINE_BYTES, claim, fma, load, pointer, splat, store, total

COUNTER, ROWS, CHUNK, WIDTH, START, COLUMN, ORDER, VALUE, X, Y, BIAS = range(11)


@inlined
def _eight(values, columns, order, x, y, b, width, at, first, last, lanes):
    """Eight vectors of one row of Y."""
    s0, s1, s2, s3 = splat(b), splat(b), splat(b), splat(b)
    s4, s5, s6, s7 = splat(b), splat(b), splat(b), splat(b)
    for k in range(first, last):
        w = splat(values[order[k]])
        i = columns[k] * width + at
        s0 = fma(w, load(x, i), s0)
        s1 = fma(w, load(x, i + lanes), s1)
        s2 = fma(w, load(x, i + 2 * lanes), s2)
        s3 = fma(w, load(x, i + 3 * lanes), s3)
        s4 = fma(w, load(x, i + 4 * lanes), s4)
        s5 = fma(w, load(x, i + 5 * lanes), s5)
        s6 = fma(w, load(x, i + 6 * lanes), s6)
        s7 = fma(w, load(x, i + 7 * lanes), s7)
    store(y, at, s0)
    store(y, at + lanes, s1)
    store(y, at + 2 * lanes, s2)
    store(y, at + 3 * lanes, s3)
    store(y, at + 4 * lanes, s4)
    store(y, at + 5 * lanes, s5)
    store(y, at + 6 * lanes, s6)
    store(y, at + 7 * lanes, s7)


@functools.cache
def product(name: str) -> Any:
    """Y = W X + b. VALUE[ORDER[k]] is the k-th weight, so that Wᵀ shares the values of W."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (11,), np.int64)
        rows, width = head[ROWS], head[WIDTH]
        start = carray(pointer(head[START]), (rows + 1,), np.int64)
        columns = carray(pointer(head[COLUMN]), (start[rows],), np.int32)
        order = carray(pointer(head[ORDER]), (start[rows],), np.int32)
        values = carray(pointer(head[VALUE]), (start[rows],), dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        bias = carray(pointer(head[BIAS]), (rows,), dtype)
        whole = width // lanes * lanes
        while True:
            chunk = claim(head)
            if chunk * head[CHUNK] >= rows:
                break
            for row in range(chunk * head[CHUNK], min((chunk + 1) * head[CHUNK], rows)):
                y = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                b = bias[row] if head[BIAS] else dtype.type(0)
                first, last = start[row], start[row + 1]
                at = 0
                while at + 8 * lanes <= whole:
                    _eight(values, columns, order, x, y, b, width, at, first, last, lanes)
                    at += 8 * lanes
                while at < whole:
                    sums = splat(b)
                    for k in range(first, last):
                        sums = fma(splat(values[order[k]]), load(x, columns[k] * width + at), sums)
                    store(y, at, sums)
                    at += lanes
                for j in range(whole, width):
                    single = b
                    for k in range(first, last):
                        single += values[order[k]] * x[columns[k] * width + j]
                    y[j] = single

    return compiled(loop)


@functools.cache
def sampled(name: str) -> Any:
    """VALUE[k] = Σ_b Y[row of k, b] · X[column of k, b], for the entries of the pattern only."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (11,), np.int64)
        rows, width = head[ROWS], head[WIDTH]
        start = carray(pointer(head[START]), (rows + 1,), np.int64)
        columns = carray(pointer(head[COLUMN]), (start[rows],), np.int32)
        values = carray(pointer(head[VALUE]), (start[rows],), dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        whole = width // lanes * lanes
        while True:
            chunk = claim(head)
            if chunk * head[CHUNK] >= rows:
                break
            for row in range(chunk * head[CHUNK], min((chunk + 1) * head[CHUNK], rows)):
                g = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                for k in range(start[row], start[row + 1]):
                    values[k] = 0
                at = 0
                while at + 8 * lanes <= whole:
                    g0, g1, g2, g3 = load(g, at), load(g, at + lanes), load(g, at + 2 * lanes), load(g, at + 3 * lanes)
                    g4, g5 = load(g, at + 4 * lanes), load(g, at + 5 * lanes)
                    g6, g7 = load(g, at + 6 * lanes), load(g, at + 7 * lanes)
                    for k in range(start[row], start[row + 1]):
                        i = columns[k] * width + at
                        a = fma(g0, load(x, i), g1 * load(x, i + lanes))
                        b = fma(g2, load(x, i + 2 * lanes), g3 * load(x, i + 3 * lanes))
                        c = fma(g4, load(x, i + 4 * lanes), g5 * load(x, i + 5 * lanes))
                        d = fma(g6, load(x, i + 6 * lanes), g7 * load(x, i + 7 * lanes))
                        values[k] += total((a + b) + (c + d))
                    at += 8 * lanes
                while at < whole:
                    g0 = load(g, at)
                    for k in range(start[row], start[row + 1]):
                        values[k] += total(g0 * load(x, columns[k] * width + at))
                    at += lanes
                for k in range(start[row], start[row + 1]):
                    for j in range(whole, width):
                        values[k] += g[j] * x[columns[k] * width + j]

    return compiled(loop)
