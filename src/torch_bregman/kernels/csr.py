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

from . import BAND
from .step import compiled, function, inlined
from .vector import LINE_BYTES, claim, fma, load, pointer, prefetch, splat, store, total

COUNTER, ROWS, CHUNK, WIDTH, START, COLUMN, VALUE, X, Y, BIAS, SOURCE, PLACE, LONGEST = range(13)


@inlined
def _eight(values, columns, x, y, b, width, at, first, last, lanes):
    """Eight vectors of one row of Y."""
    s0, s1, s2, s3 = splat(b), splat(b), splat(b), splat(b)
    s4, s5, s6, s7 = splat(b), splat(b), splat(b), splat(b)
    for k in range(first, last):
        w = splat(values[k])
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
    """Y = W X + b. With SOURCE the values are those of Wᵀ, in the order of `lists`, and CHUNK is BAND."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (13,), np.int64)
        rows, width = head[ROWS], head[WIDTH]
        start = carray(pointer(head[START]), (rows + 1,), np.int64)
        source = carray(pointer(head[SOURCE]), (start[rows],), np.int32)
        place = carray(pointer(head[PLACE]), (start[rows],), np.int32)
        every = carray(pointer(head[VALUE]), (start[rows],), dtype)
        room = np.empty(head[LONGEST], dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        bias = carray(pointer(head[BIAS]), (rows,), dtype)
        whole = width // lanes * lanes
        while True:
            chunk = claim(head)
            if chunk * head[CHUNK] >= rows:
                break
            begin, end = chunk * head[CHUNK], min((chunk + 1) * head[CHUNK], rows)
            if head[SOURCE]:
                for k in range(start[begin], start[end]):
                    room[place[k]] = every[source[k]]
            for row in range(begin, end):
                y = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                b = bias[row] if head[BIAS] else dtype.type(0)
                n = start[row + 1] - start[row]
                columns = carray(pointer(head[COLUMN] + 4 * start[row]), (n,), np.int32)
                values = room[start[row] - start[begin] :] if head[SOURCE] else every[start[row] :]
                at = 0
                while at + 8 * lanes <= whole:
                    _eight(values, columns, x, y, b, width, at, 0, n, lanes)
                    at += 8 * lanes
                while at < whole:
                    sums = splat(b)
                    for k in range(n):
                        sums = fma(splat(values[k]), load(x, columns[k] * width + at), sums)
                    store(y, at, sums)
                    at += lanes
                for j in range(whole, width):
                    single = b
                    for k in range(n):
                        single += values[k] * x[columns[k] * width + j]
                    y[j] = single

    return compiled(loop)


@functools.cache
def sampled(name: str) -> Any:
    """VALUE[k] = Σ_b Y[row of k, b] · X[column of k, b], for the entries of the pattern only."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (13,), np.int64)
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


def lists(index, out, n):
    """The pattern of a matrix [out, n] from its live entries, numbered row by row, as compressed rows of W and of Wᵀ.

    Returns (start, column) of W, (start, column) of Wᵀ, and how a band of rows of Wᵀ fetches its values: the k-th one
    that it reads is `source[k]` of W and goes to `place[k]` within the band. It reads them in ascending order: one by
    one they would be in another page of memory each.
    """
    live = len(index)
    start, across = np.zeros(out + 1, np.int64), np.zeros(n + 1, np.int64)
    column, row_of = np.empty(live, np.int32), np.empty(live, np.int32)
    source, place = np.empty(live, np.int32), np.empty(live, np.int32)
    row, end = 0, n
    for k in range(live):
        while index[k] >= end:
            row += 1
            start[row] = k
            end += n
        column[k] = index[k] - (end - n)
        across[column[k] + 1] += 1
    start[row + 1 :] = live
    for i in range(n):
        across[i + 1] += across[i]
    fill, bands = across[:-1].copy(), across[:-1:BAND].copy()
    for row in range(out):
        for k in range(start[row], start[row + 1]):
            band = column[k] // BAND
            row_of[fill[column[k]]] = row
            source[bands[band]] = k
            place[bands[band]] = fill[column[k]] - across[band * BAND]
            fill[column[k]] += 1
            bands[band] += 1
    return start, column, across, row_of, source, place


@functools.cache
def move(name: str) -> Any:
    """Y[COLUMN[k]] = VALUE[k], or VALUE[k] = X[COLUMN[k]] where X is given, in chunks of CHUNK of ROWS entries."""
    dtype = np.dtype(name)

    def loop(data):
        head = carray(data, (13,), np.int64)
        n = head[ROWS]
        index = carray(pointer(head[COLUMN]), (n,), np.int64)
        values = carray(pointer(head[VALUE]), (n,), dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        y = carray(pointer(head[Y]), (1 << 40,), dtype)
        while True:
            begin = claim(head) * head[CHUNK]
            if begin >= n:
                break
            end = min(begin + head[CHUNK], n)
            if head[X]:
                for k in range(begin, end):
                    values[k] = x[index[k]]
            else:
                for k in range(begin, end):
                    prefetch(y, index[min(k + 32, n - 1)])
                    y[index[k]] = values[k]

    return compiled(loop)


@functools.cache
def built() -> Any:
    """`lists`, compiled."""
    return function(lists)
