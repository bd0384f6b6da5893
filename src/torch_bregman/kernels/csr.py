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
from .sums import add_four
from .vector import LINE_BYTES, claim, fma, load, pointer, prefetch, select, some, splat, store, total

COUNTER, ROWS, CHUNK, WIDTH, START, COLUMN, VALUE, X, Y, BIAS, SOURCE, PLACE, LONGEST, BLOCKS, RELU = range(15)


@inlined
def _rectified(sums, zero, relu):
    """max(sums, 0) if `relu`; a NaN stays one."""
    return select(sums > zero, sums, zero) if relu else sums


@inlined
def _eight(values, columns, x, y, b, width, at, first, last, lanes, fresh, zero, relu):
    """Eight vectors of one row of Y: the sum begins with b if `fresh`, else with what Y holds."""
    s0 = splat(b) if fresh else load(y, at)
    s1 = splat(b) if fresh else load(y, at + lanes)
    s2 = splat(b) if fresh else load(y, at + 2 * lanes)
    s3 = splat(b) if fresh else load(y, at + 3 * lanes)
    s4 = splat(b) if fresh else load(y, at + 4 * lanes)
    s5 = splat(b) if fresh else load(y, at + 5 * lanes)
    s6 = splat(b) if fresh else load(y, at + 6 * lanes)
    s7 = splat(b) if fresh else load(y, at + 7 * lanes)
    for k in range(first, last):
        w = splat(values[k])
        i = columns[k] * width + at
        j = i + 4 * lanes
        s0, s1, s2, s3 = add_four(w, x, i, i + lanes, i + 2 * lanes, i + 3 * lanes, s0, s1, s2, s3)
        s4, s5, s6, s7 = add_four(w, x, j, j + lanes, j + 2 * lanes, j + 3 * lanes, s4, s5, s6, s7)
    store(y, at, _rectified(s0, zero, relu))
    store(y, at + lanes, _rectified(s1, zero, relu))
    store(y, at + 2 * lanes, _rectified(s2, zero, relu))
    store(y, at + 3 * lanes, _rectified(s3, zero, relu))
    store(y, at + 4 * lanes, _rectified(s4, zero, relu))
    store(y, at + 5 * lanes, _rectified(s5, zero, relu))
    store(y, at + 6 * lanes, _rectified(s6, zero, relu))
    store(y, at + 7 * lanes, _rectified(s7, zero, relu))


@inlined
def _one(values, columns, x, y, b, width, at, first, last, fresh, zero, relu):
    """One vector of a row of Y."""
    sums = splat(b) if fresh else load(y, at)
    for k in range(first, last):
        sums = fma(splat(values[k]), load(x, columns[k] * width + at), sums)
    store(y, at, _rectified(sums, zero, relu))


@functools.cache
def product(name: str) -> Any:
    """Y = W X + b, with RELU max(Y, 0). With SOURCE the values are those of Wᵀ, and CHUNK is BAND.

    The columns of W are taken in BLOCKS, so that the rows of X in use stay in the second cache while all rows of a
    chunk pass by, and the batch in windows of eight vectors.
    """
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (15,), np.int64)
        rows, width, blocks = head[ROWS], head[WIDTH], head[BLOCKS]
        start = carray(pointer(head[START]), (rows * blocks + 1,), np.int64)
        live = start[rows * blocks]
        columns = carray(pointer(head[COLUMN]), (live,), np.int32)
        source = carray(pointer(head[SOURCE]), (live,), np.int32)
        place = carray(pointer(head[PLACE]), (live,), np.int32)
        every = carray(pointer(head[VALUE]), (live,), dtype)
        room = np.empty(head[LONGEST], dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        bias = carray(pointer(head[BIAS]), (rows,), dtype)
        zero = splat(dtype.type(0))
        whole = width // lanes * lanes
        while True:
            chunk = claim(head)
            if chunk * head[CHUNK] >= rows:
                break
            begin, end = chunk * head[CHUNK], min((chunk + 1) * head[CHUNK], rows)
            values, before = every, np.int64(0)
            if head[SOURCE]:
                values, before = room, start[begin * blocks]
                for k in range(before, start[end * blocks]):
                    room[place[k]] = every[source[k]]
            there = columns[before:]
            at = 0
            while at < whole:
                wide = at + 8 * lanes <= whole
                for block in range(blocks):
                    relu = head[RELU] != 0 and block == blocks - 1
                    for row in range(begin, end):
                        y = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                        b = bias[row] if head[BIAS] else dtype.type(0)
                        first, last = start[row * blocks + block] - before, start[row * blocks + block + 1] - before
                        if wide:
                            _eight(values, there, x, y, b, width, at, first, last, lanes, block == 0, zero, relu)
                        else:
                            _one(values, there, x, y, b, width, at, first, last, block == 0, zero, relu)
                at += 8 * lanes if wide else lanes
            if whole < width:
                for row in range(begin, end):
                    y = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                    for j in range(whole, width):
                        single = bias[row] if head[BIAS] else dtype.type(0)
                        for k in range(start[row * blocks] - before, start[(row + 1) * blocks] - before):
                            single += values[k] * x[there[k] * width + j]
                        y[j] = dtype.type(0) if head[RELU] and single <= 0 else single

    return compiled(loop)


@functools.cache
def sampled(name: str) -> Any:
    """VALUE[k] = Σ_b Y[row of k, b] · X[column of k, b], for the entries of the pattern only."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (15,), np.int64)
        rows, width, blocks = head[ROWS], head[WIDTH], head[BLOCKS]
        start = carray(pointer(head[START]), (rows * blocks + 1,), np.int64)
        columns = carray(pointer(head[COLUMN]), (start[rows * blocks],), np.int32)
        values = carray(pointer(head[VALUE]), (start[rows * blocks],), dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        whole = width // lanes * lanes
        while True:
            chunk = claim(head)
            if chunk * head[CHUNK] >= rows:
                break
            begin, end = chunk * head[CHUNK], min((chunk + 1) * head[CHUNK], rows)
            for k in range(start[begin * blocks], start[end * blocks]):
                values[k] = 0
            at = 0
            while at < whole:
                wide = at + 8 * lanes <= whole
                for block in range(blocks):
                    for row in range(begin, end):
                        g = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                        first, last = start[row * blocks + block], start[row * blocks + block + 1]
                        g0 = load(g, at)
                        if not wide:
                            for k in range(first, last):
                                values[k] += total(g0 * load(x, columns[k] * width + at))
                            continue
                        g1, g2, g3 = load(g, at + lanes), load(g, at + 2 * lanes), load(g, at + 3 * lanes)
                        g4, g5 = load(g, at + 4 * lanes), load(g, at + 5 * lanes)
                        g6, g7 = load(g, at + 6 * lanes), load(g, at + 7 * lanes)
                        for k in range(first, last):
                            i = columns[k] * width + at
                            a = fma(g0, load(x, i), g1 * load(x, i + lanes))
                            b = fma(g2, load(x, i + 2 * lanes), g3 * load(x, i + 3 * lanes))
                            c = fma(g4, load(x, i + 4 * lanes), g5 * load(x, i + 5 * lanes))
                            d = fma(g6, load(x, i + 6 * lanes), g7 * load(x, i + 7 * lanes))
                            values[k] += total((a + b) + (c + d))
                at += 8 * lanes if wide else lanes
            for row in range(begin, end):
                g = carray(pointer(head[Y] + row * width * width_of), (width,), dtype)
                for k in range(start[row * blocks], start[(row + 1) * blocks]):
                    for j in range(whole, width):
                        values[k] += g[j] * x[columns[k] * width + j]

    return compiled(loop)


def lists(index, out, n, across, down, transposed):
    """The pattern of a matrix [out, n] from its live entries, numbered row by row: compressed rows of W and of Wᵀ.

    A row is cut into blocks of `across` columns of W, or `down` columns of Wᵀ; `start` is that of every block.

    Returns (start, column) of W and, if `transposed`, (start, column) of Wᵀ, and how a band of rows of Wᵀ fetches its
    values: the k-th one that it reads is `source[k]` of W and goes to `place[k]` within the band. It reads them in
    ascending order: one by one they would be in another page of memory each.
    """
    live, wide, high = len(index), -(-n // across), -(-out // down)
    start, other = np.zeros(out * wide + 1, np.int64), np.zeros(n * high + 1, np.int64)
    column, row_of = np.empty(live, np.int32), np.empty(live, np.int32)
    source, place = np.empty(live, np.int32), np.empty(live, np.int32)
    row, end = 0, n
    for k in range(live):
        while index[k] >= end:
            row += 1
            end += n
        j = index[k] - (end - n)
        column[k], row_of[k] = j, row
        start[row * wide + j // across + 1] += 1
        other[j * high + row // down + 1] += 1
    for i in range(out * wide):
        start[i + 1] += start[i]
    if not transposed:
        return start, column, other, row_of, source, place
    for i in range(n * high):
        other[i + 1] += other[i]
    fill, bands = other[::high].copy(), other[:: BAND * high].copy()
    rows = np.empty(live, np.int32)
    for k in range(live):
        j = column[k]
        band = j // BAND
        rows[fill[j]] = row_of[k]
        source[bands[band]] = k
        place[bands[band]] = fill[j] - other[band * BAND * high]
        fill[j] += 1
        bands[band] += 1
    return start, column, other, rows, source, place


@functools.cache
def move(name: str) -> Any:
    """Y[COLUMN[k]] = VALUE[k], or VALUE[k] = X[COLUMN[k]] where X is given, in chunks of CHUNK of ROWS entries."""
    dtype = np.dtype(name)

    def loop(data):
        head = carray(data, (15,), np.int64)
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


@functools.cache
def find(name: str) -> Any:
    """Where |x| is beyond a bound: first the counts of its chunks, then, with their sums before each, the places."""
    dtype = np.dtype(name)
    lanes = LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (8,), np.int64)
        n, size = head[1], head[2]
        counts = carray(pointer(head[3]), (n // size + 2,), np.int64)
        index = carray(pointer(head[4]), (1 << 40,), np.int64)
        x = carray(pointer(head[5]), (n,), dtype)
        bound = dtype.type(carray(pointer(head[6]), (1,), np.float64)[0])
        high, low = splat(bound), splat(-bound)
        while True:
            chunk = claim(head)
            if chunk * size >= n:
                break
            begin, end = chunk * size, min((chunk + 1) * size, n)
            count, at = np.int64(0), begin
            room, last = index[counts[chunk] :], counts[chunk + 1] - counts[chunk]
            while at < end:
                stop = min(at + lanes, end)
                if stop - at < lanes or some((load(x, at) > high) | (load(x, at) < low)):  # the others are passed over
                    for i in range(at, stop):
                        if head[7] and count < last:  # also where x is not beyond, which nobody could predict:
                            room[count] = i  # the next one overwrites it
                        count += np.int64(abs(x[i]) > bound)
                at = stop
            if head[7] == 0:
                counts[chunk + 1] = count

    return compiled(loop)
