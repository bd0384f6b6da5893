"""A whole chain of sparse layers in one call, so that Python is left out between them.

Two ways through the same layers; `optimize_for_inference` takes the one that measured faster.

.. code-block:: text

    panels    a thread takes some vectors of the batch through all layers: no layer waits for another thread.
              y[o, q] = act(b_o + Σ_k w_k x[offset_k + come_q])      the largest of a window, where pooling follows
    columns   a thread takes one sample through all layers (Linear only), and leaves out the units that are zero:
              y[rows of column j] += x_j · values of column j        for every x_j ≠ 0

In a panel every unit or pixel has a place of whole vectors, one lane per sample, with zeros around images that are
padded. A linear layer is then a convolution with one position, and all that tells layers apart is in their tables.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .step import compiled, inlined
from .sums import add_four
from .vector import LINE_BYTES, _call, _data, _llvm, _of_vector, claim, clamp, fma, load, pointer, select, splat, store

LANES = LINE_BYTES // 4
FLOAT, BYTES = np.dtype(np.float32), 4
# Of a call. ROOM: scratch memory, SIZE (of the program) numbers for each of so many THREADS.
COUNTER, ARRIVED, THREADS, PIECES, BATCH, X, Y, ROOM, PROGRAM = range(9)
HEAD = 9
# Of a program: its layers follow. FEATURES of a sample come to the places FROM, RESULTS are taken from the places TO.
LAYERS, SIZE, VECTORS, FEATURES, FROM, RESULTS, TO, WIDEST = range(8)
FIRST = 8
# Of a layer. GO of a position is its place in row 0; PLANE further is the next row. WINDOW: 1 without pooling, 4 where
# every four positions are a window, else 0, and NEW tells where a window begins. BOUNDS: what the result is clamped to.
# For columns WINDOW is 1 where they are stored with their zeros, PLANE numbers each.
ROWS, START, OFFSET, VALUE, BIAS, POSITIONS, COME, GO, NEW, PLANE, WINDOW, BOUNDS, CURVE, SOURCE, TARGET = range(15)
FIELDS = 15
# CURVE: the activations that are more than a clamp.
NONE, SIGMOID, TANH, SILU, GELU, LEAKY = range(6)


@intrinsic
def _larger(context, a, b):
    """The larger of two in every lane; a NaN stays one."""
    return a(a, b), _of_vector("maximum")


@intrinsic
def _floor(context, a):
    return a(a), _of_vector("floor")


@intrinsic
def _power_of_two(context, a):
    """2^a for whole numbers a from −126 to 127: the exponent written where a float keeps it."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(ir.IntType(32), args[0].type.count)
        exponent = builder.add(builder.fptosi(args[0], kind), ir.Constant(kind, [127] * kind.count))
        return builder.bitcast(builder.shl(exponent, ir.Constant(kind, [23] * kind.count)), args[0].type)

    return a(a), codegen


@inlined
def _number(a):
    return splat(FLOAT.type(a))


@inlined
def _exp(x):
    """e^x to a few units in the last place: 2^n times a Taylor polynomial of what is left over."""
    x = clamp(x, _number(-87.0), _number(88.0))
    n = _floor(fma(x, _number(1.4426950408889634), _number(0.5)))
    r = fma(n, _number(-0.693359375), x)  # log 2 in two parts, the first of few digits
    r = fma(n, _number(2.12194440e-4), r)
    p = fma(_number(1 / 5040), r, _number(1 / 720))
    p = fma(p, r, _number(1 / 120))
    p = fma(p, r, _number(1 / 24))
    p = fma(p, r, _number(1 / 6))
    p = fma(p, r, _number(0.5))
    p = fma(p, r, _number(1.0))
    return fma(p, r, _number(1.0)) * _power_of_two(n)


@inlined
def _curved(x, curve, slope):
    zero, one = _number(0.0), _number(1.0)
    if curve == LEAKY:
        return select(x > zero, x, x * slope)
    if curve == TANH:
        return one - _number(2.0) / (_exp(x + x) + one)
    if curve == GELU:  # the error function after Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most
        z = x * _number(0.7071067811865476)
        sign = select(z > zero, one, _number(-1.0))
        z = z * sign
        t = one / fma(_number(0.3275911), z, one)
        p = fma(_number(1.061405429), t, _number(-1.453152027))
        p = fma(p, t, _number(1.421413741))
        p = fma(p, t, _number(-0.284496736))
        p = fma(p, t, _number(0.254829592))
        erf = sign * (one - p * t * _exp(zero - z * z))
        return x * _number(0.5) * (one + erf)
    sigmoid = one / (one + _exp(zero - x))
    return sigmoid if curve == SIGMOID else x * sigmoid


@intrinsic
def _at(context, array, index):
    """array[index] without Numba's question whether the index is negative."""

    def codegen(context, builder, signature, args):
        return builder.load(builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]]))

    return array.dtype(array, index), codegen


@intrinsic
def _put(context, array, index, value):
    """array[index] = value in the same way."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], builder.gep(_data(context, builder, signature.args[0], args[0]), [args[1]]))
        return context.get_dummy_value()

    return types.void(array, index, value), codegen


@intrinsic
def _fma(context, a, b, c):
    """a·b + c of numbers."""
    return a(a, b, c), lambda context, builder, signature, args: _call(builder, "llvm.fma.f32", args[0].type, args)


@intrinsic
def _turn(context, source, come, target, go):
    """target[go[j] + i] = source[come[i] + j] for all i, j < LANES: a square turned over its diagonal, in registers."""

    def codegen(context, builder, signature, args):
        source, come, target, go = (_data(context, builder, t, a) for t, a in zip(signature.args, args, strict=True))
        line, word = _llvm(types.float32), ir.IntType(64)

        def place(data, offsets, i):
            at = builder.load(builder.gep(offsets, [ir.Constant(word, i)]))
            return builder.bitcast(builder.gep(data, [at]), line.as_pointer())

        lines = [builder.load(place(source, come, i), align=BYTES) for i in range(LANES)]
        step = LANES // 2
        while step:  # exchange what lies off the diagonal, in ever smaller squares
            kind = ir.VectorType(ir.IntType(32), LANES)
            lower = [j if not j & step else j - step + LANES for j in range(LANES)]
            upper = [j + step if not j & step else j + LANES for j in range(LANES)]
            for i in range(LANES):
                if not i & step:
                    a, b = lines[i], lines[i + step]
                    lines[i] = builder.shuffle_vector(a, b, ir.Constant(kind, lower))
                    lines[i + step] = builder.shuffle_vector(a, b, ir.Constant(kind, upper))
            step //= 2
        for i in range(LANES):
            builder.store(lines[i], place(target, go, i), align=BYTES)
        return context.get_dummy_value()

    return types.void(source, come, target, go), codegen


@inlined
def _pack(x, room, where, features, vectors, first, valid, rows, places):
    """`valid` samples from the first on into their lanes; lanes that are left repeat the last sample."""
    wide = vectors * LANES
    for v in range(vectors):
        for i in range(LANES):
            rows[i] = (first + min(v * LANES + i, valid - 1)) * features
        whole = features // LANES * LANES
        for begin in range(0, whole, LANES):
            for j in range(LANES):
                _put(places, j, np.int64(_at(where, begin + j)) * wide + v * LANES)
            _turn(x, rows, room, places)
            for i in range(LANES):
                _put(rows, i, _at(rows, i) + LANES)
        for f in range(whole, features):
            for i in range(LANES):
                _put(room, where[f] * wide + v * LANES + i, x[(first + min(v * LANES + i, valid - 1)) * features + f])


@inlined
def _unpack(y, room, where, results, vectors, first, valid, rows, places):
    """The other way; lanes that repeat the last sample write what it wrote."""
    wide = vectors * LANES
    for v in range((valid + LANES - 1) // LANES):
        for i in range(LANES):
            rows[i] = (first + min(v * LANES + i, valid - 1)) * results
        whole = results // LANES * LANES
        for begin in range(0, whole, LANES):
            for j in range(LANES):
                _put(places, j, np.int64(_at(where, begin + j)) * wide + v * LANES)
            _turn(room, places, y, rows)
            for i in range(LANES):
                _put(rows, i, _at(rows, i) + LANES)
        for f in range(whole, results):
            for i in range(min(LANES, valid - v * LANES)):
                _put(y, (first + v * LANES + i) * results + f, _at(room, where[f] * wide + v * LANES + i))


@inlined
def _one(room, offset, values, first, last, c, initial):
    """The sum at one position; two halves, for each addition waits for the one before."""
    s, t = initial, _number(0.0)
    k = first
    while k + 1 < last:
        s = fma(splat(_at(values, k)), load(room, np.int64(_at(offset, k)) + c), s)
        t = fma(splat(_at(values, k + 1)), load(room, np.int64(_at(offset, k + 1)) + c), t)
        k += 2
    if k < last:
        s = fma(splat(_at(values, k)), load(room, np.int64(_at(offset, k)) + c), s)
    return s + t


@functools.cache
def panels() -> Any:
    """Every piece is VECTORS vectors of the batch."""

    def loop(data):
        head = carray(data, (HEAD,), np.int64)
        program = carray(pointer(head[PROGRAM]), (1 << 30,), np.int64)
        size, vectors = program[SIZE], program[VECTORS]
        thread = claim(head[ARRIVED:])
        if thread >= head[THREADS]:  # there is no scratch memory for it
            return
        room = carray(pointer(head[ROOM] + thread * size * BYTES), (size,), FLOAT)
        x = carray(pointer(head[X]), (1 << 40,), FLOAT)
        y = carray(pointer(head[Y]), (1 << 40,), FLOAT)
        come_in = carray(pointer(program[FROM]), (program[FEATURES],), np.int32)
        go_out = carray(pointer(program[TO]), (program[RESULTS],), np.int32)
        rows_at, places = np.empty(LANES, np.int64), np.empty(LANES, np.int64)
        while True:
            piece = claim(head)
            if piece >= head[PIECES]:
                break
            begin = piece * vectors * LANES
            valid = min(vectors * LANES, head[BATCH] - begin)
            _pack(x, room, come_in, program[FEATURES], vectors, begin, valid, rows_at, places)
            for number in range(program[LAYERS]):
                layer = program[FIRST + number * FIELDS :]
                rows, n, window = layer[ROWS], layer[POSITIONS], layer[WINDOW]
                start = carray(pointer(layer[START]), (rows + 1,), np.int32)
                offset = carray(pointer(layer[OFFSET]), (1 << 40,), np.int32)
                values = carray(pointer(layer[VALUE]), (1 << 40,), FLOAT)
                bias = carray(pointer(layer[BIAS]), (rows,), FLOAT)
                come = carray(pointer(layer[COME]), (n,), np.int32)
                go = carray(pointer(layer[GO]), (n,), np.int32)
                new = carray(pointer(layer[NEW]), (n,), np.uint8)
                bounds = carray(pointer(layer[BOUNDS]), (3,), FLOAT)
                low, high, slope = splat(bounds[0]), splat(bounds[1]), splat(bounds[2])
                for row in range(rows):
                    first, last = start[row], start[row + 1]
                    initial, to = splat(bias[row]), row * layer[PLANE]
                    best = initial
                    p = 0
                    while p < n:
                        c0 = np.int64(_at(come, p))
                        if n - p >= 8:
                            c1, c2 = np.int64(_at(come, p + 1)), np.int64(_at(come, p + 2))
                            c3 = np.int64(_at(come, p + 3))
                            c4, c5 = np.int64(_at(come, p + 4)), np.int64(_at(come, p + 5))
                            c6, c7 = np.int64(_at(come, p + 6)), np.int64(_at(come, p + 7))
                            s0, s1, s2, s3 = initial, initial, initial, initial
                            s4, s5, s6, s7 = initial, initial, initial, initial
                            for k in range(first, last):
                                v, at = splat(_at(values, k)), np.int64(_at(offset, k))
                                s0, s1, s2, s3 = add_four(v, room, at + c0, at + c1, at + c2, at + c3, s0, s1, s2, s3)
                                s4, s5, s6, s7 = add_four(v, room, at + c4, at + c5, at + c6, at + c7, s4, s5, s6, s7)
                            if window == 4:
                                s0 = _larger(_larger(s0, s1), _larger(s2, s3))
                                s4 = _larger(_larger(s4, s5), _larger(s6, s7))
                                store(room, to + _at(go, p), clamp(s0, low, high))
                                store(room, to + _at(go, p + 4), clamp(s4, low, high))
                            elif window == 1:
                                _store_four(room, to, go, p, s0, s1, s2, s3, low, high)
                                _store_four(room, to, go, p + 4, s4, s5, s6, s7, low, high)
                            else:
                                best = _pooled_four(room, to, go, new, p, s0, s1, s2, s3, best, low, high)
                                best = _pooled_four(room, to, go, new, p + 4, s4, s5, s6, s7, best, low, high)
                            p += 8
                        elif n - p >= 4:
                            c1, c2 = np.int64(_at(come, p + 1)), np.int64(_at(come, p + 2))
                            c3 = np.int64(_at(come, p + 3))
                            s0, s1, s2, s3 = initial, initial, initial, initial
                            for k in range(first, last):
                                v, at = splat(_at(values, k)), np.int64(_at(offset, k))
                                s0, s1, s2, s3 = add_four(v, room, at + c0, at + c1, at + c2, at + c3, s0, s1, s2, s3)
                            best = _pooled_four(room, to, go, new, p, s0, s1, s2, s3, best, low, high)
                            p += 4
                        elif n - p >= 2:
                            c1 = np.int64(_at(come, p + 1))
                            s0, s1, s2, s3 = initial, initial, _number(0.0), _number(0.0)
                            k = first
                            while k + 1 < last:
                                v, at = splat(_at(values, k)), np.int64(_at(offset, k))
                                w, on = splat(_at(values, k + 1)), np.int64(_at(offset, k + 1))
                                s0, s1 = fma(v, load(room, at + c0), s0), fma(v, load(room, at + c1), s1)
                                s2, s3 = fma(w, load(room, on + c0), s2), fma(w, load(room, on + c1), s3)
                                k += 2
                            if k < last:
                                v, at = splat(_at(values, k)), np.int64(_at(offset, k))
                                s0, s1 = fma(v, load(room, at + c0), s0), fma(v, load(room, at + c1), s1)
                            best = _pooled(room, to + _at(go, p), _at(new, p), s0 + s2, best, low, high)
                            best = _pooled(room, to + _at(go, p + 1), _at(new, p + 1), s1 + s3, best, low, high)
                            p += 2
                        else:
                            s0 = _one(room, offset, values, first, last, c0, initial)
                            best = _pooled(room, to + _at(go, p), _at(new, p), s0, best, low, high)
                            p += 1
                    if layer[CURVE] != NONE:
                        for p in range(n):
                            if _at(new, p):
                                store(room, to + _at(go, p), _curved(load(room, to + _at(go, p)), layer[CURVE], slope))
            _unpack(y, room, go_out, program[RESULTS], vectors, begin, valid, rows_at, places)

    return compiled(loop)


@inlined
def _pooled(room, at, new, s, best, low, high):
    """Put down the largest since the window began; returns it."""
    best = s if new else _larger(best, s)
    store(room, at, clamp(best, low, high))
    return best


@inlined
def _pooled_four(room, to, go, new, p, s0, s1, s2, s3, best, low, high):
    """The same for four positions."""
    best = _pooled(room, to + _at(go, p), _at(new, p), s0, best, low, high)
    best = _pooled(room, to + _at(go, p + 1), _at(new, p + 1), s1, best, low, high)
    best = _pooled(room, to + _at(go, p + 2), _at(new, p + 2), s2, best, low, high)
    return _pooled(room, to + _at(go, p + 3), _at(new, p + 3), s3, best, low, high)


@inlined
def _store_four(room, to, go, p, s0, s1, s2, s3, low, high):
    """Put down four positions, where no pooling follows."""
    store(room, to + _at(go, p), clamp(s0, low, high))
    store(room, to + _at(go, p + 1), clamp(s1, low, high))
    store(room, to + _at(go, p + 2), clamp(s2, low, high))
    store(room, to + _at(go, p + 3), clamp(s3, low, high))


@functools.cache
def columns() -> Any:
    """Every piece is a sample. Columns are filled up to fours, with zeros that go to a row beyond the last."""

    def loop(data):
        head = carray(data, (HEAD,), np.int64)
        program = carray(pointer(head[PROGRAM]), (1 << 30,), np.int64)
        size, layers = program[SIZE], program[LAYERS]
        thread = claim(head[ARRIVED:])
        if thread >= head[THREADS]:  # there is no scratch memory for it
            return
        place = head[ROOM] + thread * size * BYTES
        room = carray(pointer(place), (size,), FLOAT)
        alive = np.empty(program[WIDEST] + 1, np.int32)
        while True:
            piece = claim(head)
            if piece >= head[PIECES]:
                break
            come = head[X] + piece * program[FEATURES] * BYTES
            for number in range(layers):
                layer = program[FIRST + number * FIELDS :]
                rows, n = layer[ROWS], layer[POSITIONS]
                x = carray(pointer(come), (n,), FLOAT)
                start = carray(pointer(layer[START]), (n + 1,), np.int32)
                row = carray(pointer(layer[OFFSET]), (1 << 40,), np.uint16)
                values = carray(pointer(layer[VALUE]), (1 << 40,), FLOAT)
                bias = carray(pointer(layer[BIAS]), (1 << 40,), FLOAT)
                bounds = carray(pointer(layer[BOUNDS]), (3,), FLOAT)
                low, high, slope = splat(bounds[0]), splat(bounds[1]), splat(bounds[2])
                y = room[layer[TARGET] :]
                for at in range(0, rows, LANES):
                    store(y, at, load(bias, at))
                y[rows] = FLOAT.type(0)  # where the columns are filled up
                count = 0
                for j in range(n):  # nobody could predict which units are zero, so no branch on it
                    _put(alive, count, np.int32(j))
                    count += np.int64(_at(x, j) != 0)
                for i in range(count):
                    j = np.int64(_at(alive, i))
                    v = _at(x, j)
                    if layer[WINDOW]:  # the column as it is
                        for at in range(0, rows, LANES):
                            store(y, at, fma(splat(v), load(values, j * layer[PLANE] + at), load(y, at)))
                        continue
                    for k in range(start[j], start[j + 1], 4):
                        r0, r1 = np.int64(_at(row, k)), np.int64(_at(row, k + 1))
                        r2, r3 = np.int64(_at(row, k + 2)), np.int64(_at(row, k + 3))
                        y0, y1 = _fma(v, _at(values, k), _at(y, r0)), _fma(v, _at(values, k + 1), _at(y, r1))
                        y2, y3 = _fma(v, _at(values, k + 2), _at(y, r2)), _fma(v, _at(values, k + 3), _at(y, r3))
                        _put(y, r0, y0)
                        _put(y, r1, y1)
                        _put(y, r2, y2)
                        _put(y, r3, y3)
                for at in range(0, rows, LANES):
                    z = clamp(load(y, at), low, high)
                    store(y, at, z if layer[CURVE] == NONE else _curved(z, layer[CURVE], slope))
                come = place + layer[TARGET] * BYTES
            y = carray(pointer(head[Y] + piece * program[RESULTS] * BYTES), (program[RESULTS],), FLOAT)
            for i in range(program[RESULTS]):
                y[i] = room[program[TO] + i]

    return compiled(loop)
