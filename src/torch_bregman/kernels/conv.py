"""Convolutions with a sparse weight, for activations that lie batch-last: X [C, H, W, batch], Y [out, H', W', batch].

.. code-block:: text

    product      Y[o, q] = b_o + Σ_k w_k X[c_k, q·s + d_k]     over the weights k of filter o, for every position q
    sampled      g_k = Σ_q ⟨G[o_k, q], X[c_k, q·s + d_k]⟩      the gradient of the live weights, and of no other
    pool, unpool the largest entry of every window, and the gradient back to where it came from

The gradient to the input is the product with the transposed lists: with stride s the pixels of one remainder modulo s
are reached by the same weights, so each of these s² phases is a convolution of its own, and no two add to one pixel.

A thread takes a piece: one vector of the batch and a rectangle of positions. It copies what the piece reads into a
buffer of its own, which fits its level-2 cache, with zeros around the image and in the lanes beyond the batch. There a
weight is one offset, the same at every position, and the sums of eight positions stay in registers while the weights
of a filter pass by.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray

from .step import compiled, inlined
from .sums import add_four
from .vector import LINE_BYTES, claim, fma, load, pointer, select, splat, store, total

# The head of product and sampled. NA × NB: positions of one phase; TALL × WIDE: of one piece; HIGH × BROAD: pixels that
# a piece reads, the first of them at (LOW_Y, LOW_X) from the first position times the stride.
COUNTER, PIECES, BATCH, NA, NB, TALL, WIDE, HIGH, BROAD, LOW_Y, LOW_X = range(11)
X, X_B, X_C, X_H, X_W, CHANNELS, HEIGHT, WIDTH, STRIDE_Y, STRIDE_X = range(11, 21)
ROWS, START, OFFSET, VALUE, BIAS = range(21, 26)
Y, OUT_H, OUT_W, PHASES_Y, PHASES_X = range(26, 31)
G, G_B, G_C, G_H, G_W, SLOTS, LIVE, STEPS = range(31, 39)
SIZE = 39


@inlined
def _buffer(n, dtype, width_of):
    """n entries that begin at a cache line."""
    room = np.empty(n + LINE_BYTES // width_of, dtype)
    return room[(-room.ctypes.data % LINE_BYTES) // width_of :]


@inlined
def _pack(head, x, buffer, lane, valid, top, left, lanes):
    """The pixels from (top, left) on of all channels, `lanes` images from `lane` on, into the buffer."""
    high, broad = head[HIGH], head[BROAD]
    sb, sc, sh, sw = head[X_B], head[X_C], head[X_H], head[X_W]
    zero = splat(x.dtype.type(0))
    first, last = max(0, -left), min(broad, head[WIDTH] - left)
    for c in range(head[CHANNELS]):
        for h in range(high):
            to = (c * high + h) * broad * lanes
            inside = 0 <= top + h < head[HEIGHT] and first < last
            begin, end = (first, last) if inside else (0, 0)
            for w in range(begin):
                store(buffer, to + w * lanes, zero)
            for w in range(end, broad):
                store(buffer, to + w * lanes, zero)
            if valid < lanes:
                for w in range(begin, end):
                    store(buffer, to + w * lanes, zero)
    begin, end = max(0, -top), min(high, head[HEIGHT] - top)
    corner = lane * sb + top * sh + left * sw
    if sb == 1 and valid == lanes:
        for c in range(head[CHANNELS]):
            for h in range(begin, end):
                to, at = (c * high + h) * broad * lanes, corner + c * sc + h * sh
                for w in range(first, last):
                    store(buffer, to + w * lanes, load(x, at + w * sw))
    elif sc < sw:
        for h in range(begin, end):
            for w in range(first, last):
                for i in range(valid):
                    to, at = (h * broad + w) * lanes + i, corner + i * sb + h * sh + w * sw
                    for c in range(head[CHANNELS]):
                        buffer[to + c * high * broad * lanes] = x[at + c * sc]
    else:
        for c in range(head[CHANNELS]):
            for h in range(begin, end):
                for i in range(valid):
                    to, at = (c * high + h) * broad * lanes + i, corner + i * sb + c * sc + h * sh
                    for w in range(first, last):
                        buffer[to + w * lanes] = x[at + w * sw]


@inlined
def _put(y, at, sums, valid, lanes, line):
    if valid == lanes:
        store(y, at, sums)
    else:
        store(line, 0, sums)
        for i in range(valid):
            y[at + i] = line[i]


@functools.cache
def product(name: str) -> Any:
    """Y = b + the convolution of X with the weights in the lists; Y is batch-last without gaps.

    START may divide the weights of a row by the rows of pixels they read, STEPS of them from the first: those that
    read nothing but zeros above and below the image are then left out.
    """
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (SIZE,), np.int64)
        batch, na, nb, tall, wide = head[BATCH], head[NA], head[NB], head[TALL], head[WIDE]
        rows, phases_y, phases_x = head[ROWS], head[PHASES_Y], head[PHASES_X]
        out_h, out_w, broad = head[OUT_H], head[OUT_W], head[BROAD]
        steps = head[STEPS]
        start = carray(pointer(head[START]), (phases_y * phases_x * rows * steps + 1,), np.int64)
        live = start[phases_y * phases_x * rows * steps]
        offset = carray(pointer(head[OFFSET]), (live,), np.int32)
        values = carray(pointer(head[VALUE]), (live,), dtype)
        bias = carray(pointer(head[BIAS]), (rows,), dtype)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        y = carray(pointer(head[Y]), (1 << 40,), dtype)
        buffer = _buffer((head[CHANNELS] * head[HIGH] * broad + 1) * lanes, dtype, width_of)
        line = buffer[head[CHANNELS] * head[HIGH] * broad * lanes :]
        come, go = np.empty(tall * wide + 8, np.int64), np.empty(tall * wide + 8, np.int64)
        above, below = np.zeros(tall * wide + 8, np.int64), np.full(tall * wide + 8, steps)
        vectors, across = (batch + lanes - 1) // lanes, (nb + wide - 1) // wide
        while True:
            piece = claim(head)
            if piece >= head[PIECES]:
                break
            lane, tile = piece % vectors * lanes, piece // vectors
            a0, b0 = tile // across * tall, tile % across * wide
            valid = min(lanes, batch - lane)
            top, left = a0 * head[STRIDE_Y] + head[LOW_Y], b0 * head[STRIDE_X] + head[LOW_X]
            _pack(head, x, buffer, lane, valid, top, left, lanes)
            for phase in range(phases_y * phases_x):
                n = 0
                for a in range(a0, min(a0 + tall, na)):
                    for b in range(b0, min(b0 + wide, nb)):
                        h, w = a * phases_y + phase // phases_x, b * phases_x + phase % phases_x
                        if h < out_h and w < out_w:
                            come[n] = ((a - a0) * head[STRIDE_Y] * broad + (b - b0) * head[STRIDE_X]) * lanes
                            go[n] = (h * out_w + w) * batch + lane
                            if steps > 1:
                                y0 = a * head[STRIDE_Y] + head[LOW_Y]
                                above[n] = min(max(0, -y0), steps)
                                below[n] = max(0, min(steps, head[HEIGHT] - y0))
                            n += 1
                if n == 0:
                    continue
                for p in range(n, n + 7):  # the last group may compute its last position several times
                    come[p], go[p], above[p], below[p] = come[n - 1], go[n - 1], above[n - 1], below[n - 1]
                for row in range(rows):
                    begin = (phase * rows + row) * steps
                    initial = splat(bias[row] if head[BIAS] else dtype.type(0))
                    to = row * out_h * out_w * batch
                    p = 0
                    while p < n:
                        i0, i1, i2, i3 = come[p], come[p + 1], come[p + 2], come[p + 3]
                        # positions are in the order of their rows: the last one reads the least above the image
                        end = p + 7 if n - p > 4 else p + 3
                        first, last = start[begin + above[end]], start[begin + below[p]]
                        if n - p > 4:
                            i4, i5, i6, i7 = come[p + 4], come[p + 5], come[p + 6], come[p + 7]
                            s0, s1, s2, s3 = initial, initial, initial, initial
                            s4, s5, s6, s7 = initial, initial, initial, initial
                            for k in range(first, last):
                                v, at = splat(values[k]), np.int64(offset[k])
                                s0, s1, s2, s3 = add_four(v, buffer, at + i0, at + i1, at + i2, at + i3, s0, s1, s2, s3)
                                s4, s5, s6, s7 = add_four(v, buffer, at + i4, at + i5, at + i6, at + i7, s4, s5, s6, s7)
                            # One by one: four of them in a function of their own make the loop above 15 % slower.
                            _put(y, to + go[p], s0, valid, lanes, line)
                            _put(y, to + go[p + 1], s1, valid, lanes, line)
                            _put(y, to + go[p + 2], s2, valid, lanes, line)
                            _put(y, to + go[p + 3], s3, valid, lanes, line)
                            _put(y, to + go[p + 4], s4, valid, lanes, line)
                            _put(y, to + go[p + 5], s5, valid, lanes, line)
                            _put(y, to + go[p + 6], s6, valid, lanes, line)
                            _put(y, to + go[p + 7], s7, valid, lanes, line)
                            p += 8
                        else:
                            s0, s1, s2, s3 = initial, initial, initial, initial
                            for k in range(first, last):
                                v, at = splat(values[k]), np.int64(offset[k])
                                s0, s1, s2, s3 = add_four(v, buffer, at + i0, at + i1, at + i2, at + i3, s0, s1, s2, s3)
                            _put(y, to + go[p], s0, valid, lanes, line)
                            _put(y, to + go[p + 1], s1, valid, lanes, line)
                            _put(y, to + go[p + 2], s2, valid, lanes, line)
                            _put(y, to + go[p + 3], s3, valid, lanes, line)
                            p += 4

    return compiled(loop)


@functools.cache
def sampled(name: str) -> Any:
    """VALUE[slot, k]: the gradient of weight k over the pieces of one slot; the sum over the slots is left to do.

    The pieces of a slot are added in order by one thread, so the rounding does not depend on how many threads there
    are. G [rows, NA, NB] may lie in memory in any order.
    """
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (SIZE,), np.int64)
        batch, na, nb, tall, wide = head[BATCH], head[NA], head[NB], head[TALL], head[WIDE]
        rows, broad, live = head[ROWS], head[BROAD], head[LIVE]
        start = carray(pointer(head[START]), (rows + 1,), np.int64)
        offset = carray(pointer(head[OFFSET]), (live,), np.int32)
        x = carray(pointer(head[X]), (1 << 40,), dtype)
        g = carray(pointer(head[G]), (1 << 40,), dtype)
        gb, gc, gh, gw = head[G_B], head[G_C], head[G_H], head[G_W]
        most = 0
        for row in range(rows):
            most = max(most, start[row + 1] - start[row])
        groups = (tall * wide + 7) // 8
        pixels = head[CHANNELS] * head[HIGH] * broad
        buffer = _buffer((pixels + 8 * groups + most) * lanes, dtype, width_of)
        taken, sums = buffer[pixels * lanes :], buffer[(pixels + 8 * groups) * lanes :]
        come = np.empty(8 * groups, np.int64)
        vectors, across = (batch + lanes - 1) // lanes, (nb + wide - 1) // wide
        zero = splat(dtype.type(0))
        while True:
            slot = claim(head)
            if slot >= head[SLOTS]:
                break
            found = carray(pointer(head[VALUE] + slot * live * width_of), (live,), dtype)
            for k in range(live):
                found[k] = 0
            for piece in range(slot, head[PIECES], head[SLOTS]):
                lane, tile = piece % vectors * lanes, piece // vectors
                a0, b0 = tile // across * tall, tile % across * wide
                a1, b1 = min(a0 + tall, na), min(b0 + wide, nb)
                valid = min(lanes, batch - lane)
                top, left = a0 * head[STRIDE_Y] + head[LOW_Y], b0 * head[STRIDE_X] + head[LOW_X]
                _pack(head, x, buffer, lane, valid, top, left, lanes)
                n = 0
                for a in range(a1 - a0):
                    for b in range(b1 - b0):
                        come[n] = (a * head[STRIDE_Y] * broad + b * head[STRIDE_X]) * lanes
                        n += 1
                whole = (n + 7) // 8 * 8
                for p in range(n, whole):
                    come[p] = 0
                for p in range(0 if valid < lanes else n, whole):
                    store(taken, p * lanes, zero)
                for row in range(rows):
                    first, last = start[row], start[row + 1]
                    if first == last:
                        continue
                    p = 0
                    for a in range(a0, a1):
                        at = row * gc + lane * gb + a * gh + b0 * gw
                        if gb == 1 and valid == lanes:
                            for b in range(b1 - b0):
                                store(taken, (p + b) * lanes, load(g, at + b * gw))
                        else:
                            for i in range(valid):
                                for b in range(b1 - b0):
                                    taken[(p + b) * lanes + i] = g[at + i * gb + b * gw]
                        p += b1 - b0
                    for k in range(last - first):
                        store(sums, k * lanes, zero)
                    for p in range(0, whole, 8):
                        i0, i1, i2, i3 = come[p], come[p + 1], come[p + 2], come[p + 3]
                        i4, i5, i6, i7 = come[p + 4], come[p + 5], come[p + 6], come[p + 7]
                        q = p * lanes
                        g0, g1 = load(taken, q), load(taken, q + lanes)
                        g2, g3 = load(taken, q + 2 * lanes), load(taken, q + 3 * lanes)
                        g4, g5 = load(taken, q + 4 * lanes), load(taken, q + 5 * lanes)
                        g6, g7 = load(taken, q + 6 * lanes), load(taken, q + 7 * lanes)
                        for k in range(first, last):
                            at = np.int64(offset[k])
                            s = fma(g0, load(buffer, at + i0), load(sums, (k - first) * lanes))
                            s = fma(g1, load(buffer, at + i1), s)
                            s = fma(g2, load(buffer, at + i2), s)
                            s = fma(g3, load(buffer, at + i3), s)
                            s = fma(g4, load(buffer, at + i4), s)
                            s = fma(g5, load(buffer, at + i5), s)
                            s = fma(g6, load(buffer, at + i6), s)
                            s = fma(g7, load(buffer, at + i7), s)
                            store(sums, (k - first) * lanes, s)
                    for k in range(first, last):
                        found[k] += total(load(sums, (k - first) * lanes))

    return compiled(loop)


# The head of pool and unpool.
(
    POOL_COUNTER, POOL_CHANNELS, POOL_BATCH, POOL_X, POOL_Y, POOL_WHICH, POOL_HEIGHT, POOL_WIDTH, POOL_OUT_H,
    POOL_OUT_W, KERNEL_Y, KERNEL_X, STEP_Y, STEP_X, PADDING_Y, PADDING_X, RELU,
) = range(17)  # fmt: skip
POOL_SIZE = 17


@inlined
def _window(head, h, w):
    """The pixel (top, left) of window (h, w), and which of its rows and columns lie within the image."""
    top, left = h * head[STEP_Y] - head[PADDING_Y], w * head[STEP_X] - head[PADDING_X]
    i1, j1 = min(head[KERNEL_Y], head[POOL_HEIGHT] - top), min(head[KERNEL_X], head[POOL_WIDTH] - left)
    return top, left, max(0, -top), i1, max(0, -left), j1


@inlined
def _images(head, c, dtype, width_of):
    """X, Y and WHICH of one channel."""
    x, y = (
        head[POOL_HEIGHT] * head[POOL_WIDTH] * head[POOL_BATCH],
        head[POOL_OUT_H] * head[POOL_OUT_W] * head[POOL_BATCH],
    )
    return (
        carray(pointer(head[POOL_X] + c * x * width_of), (x,), dtype),
        carray(pointer(head[POOL_Y] + c * y * width_of), (y,), dtype),
        carray(pointer(head[POOL_WHICH] + c * y * width_of), (y,), dtype),
    )


@functools.cache
def pool(name: str) -> Any:
    """Y = the largest entry of every window of X, WHICH = its number in the window; the first one of equals.

    X [channels, height, width, batch], Y and WHICH alike. A NaN is larger than everything, and of several the last one
    counts, as in torch. With RELU windows without a positive entry give zero, and WHICH = −1.
    """
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (POOL_SIZE,), np.int64)
        batch, width, out_h, out_w = head[POOL_BATCH], head[POOL_WIDTH], head[POOL_OUT_H], head[POOL_OUT_W]
        whole, relu = batch // lanes * lanes, head[RELU] != 0
        zero, nowhere = splat(dtype.type(0)), splat(dtype.type(-1))
        while True:
            c = claim(head)
            if c >= head[POOL_CHANNELS]:
                break
            x, y, which = _images(head, c, dtype, width_of)
            for h in range(out_h):
                for w in range(out_w):
                    top, left, i0, i1, j0, j1 = _window(head, h, w)
                    to = (h * out_w + w) * batch
                    for at in range(0, whole, lanes):
                        most = load(x, ((top + i0) * width + left + j0) * batch + at)
                        place = splat(dtype.type(i0 * head[KERNEL_X] + j0))
                        for i in range(i0, i1):
                            for j in range(j0, j1):
                                v = load(x, ((top + i) * width + left + j) * batch + at)
                                better = select(most != most, v != v, v > most)
                                most = select(better, v, most)
                                place = select(better, splat(dtype.type(i * head[KERNEL_X] + j)), place)
                        if relu:
                            alive = most > zero
                            most, place = select(alive, most, zero), select(alive, place, nowhere)
                        store(y, to + at, most)
                        store(which, to + at, place)
                    for at in range(whole, batch):
                        single = x[((top + i0) * width + left + j0) * batch + at]
                        number = i0 * head[KERNEL_X] + j0
                        for i in range(i0, i1):
                            for j in range(j0, j1):
                                u = x[((top + i) * width + left + j) * batch + at]
                                if u > single or np.isnan(u):
                                    single, number = u, i * head[KERNEL_X] + j
                        if relu and single <= 0:
                            single, number = dtype.type(0), -1
                        y[to + at], which[to + at] = single, number

    return compiled(loop)


@functools.cache
def unpool(name: str) -> Any:
    """X = the sum of Y over the windows whose largest entry it was: the gradient to the input of `pool`."""
    dtype = np.dtype(name)
    width_of, lanes = dtype.itemsize, LINE_BYTES // dtype.itemsize

    def loop(data):
        head = carray(data, (POOL_SIZE,), np.int64)
        batch, width, out_h, out_w = head[POOL_BATCH], head[POOL_WIDTH], head[POOL_OUT_H], head[POOL_OUT_W]
        apart = head[STEP_Y] >= head[KERNEL_Y] and head[STEP_X] >= head[KERNEL_X]
        covered = (
            head[STEP_Y] == head[KERNEL_Y] and head[STEP_X] == head[KERNEL_X] and not head[PADDING_Y]
            and not head[PADDING_X] and out_h * head[STEP_Y] == head[POOL_HEIGHT] and out_w * head[STEP_X] == width
        )  # fmt: skip
        whole, zero = batch // lanes * lanes, splat(dtype.type(0))
        while True:
            c = claim(head)
            if c >= head[POOL_CHANNELS]:
                break
            x, y, which = _images(head, c, dtype, width_of)
            if not covered:
                x[:] = 0
            for h in range(out_h):
                for w in range(out_w):
                    top, left, i0, i1, j0, j1 = _window(head, h, w)
                    to = (h * out_w + w) * batch
                    for at in range(0, whole, lanes):
                        v, place = load(y, to + at), load(which, to + at)
                        for i in range(i0, i1):
                            for j in range(j0, j1):
                                k = ((top + i) * width + left + j) * batch + at
                                part = select(place != splat(dtype.type(i * head[KERNEL_X] + j)), zero, v)
                                store(x, k, part if apart else load(x, k) + part)
                    for at in range(whole, batch):
                        number = np.int64(which[to + at])
                        if covered:
                            for i in range(i0, i1):
                                for j in range(j0, j1):
                                    x[((top + i) * width + left + j) * batch + at] = 0
                        if number < 0:
                            continue
                        i, j = number // head[KERNEL_X], number % head[KERNEL_X]
                        x[((top + i) * width + left + j) * batch + at] += y[to + at]

    return compiled(loop)
