"""The pass over memory of step.py for GPUs, in Triton: one launch for all tensors of a parameter group.

Here θ is read and compared in full, as the readable step does; skipping cache lines is for CPUs. A table has a row of
`WIDTH` int64 per tensor: the ADDRESSES of columns.py, and the bits of its float64 NUMBERS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .columns import ADDRESSES, NUMBERS

WIDTH = len(ADDRESSES) + len(NUMBERS)
BLOCK = 1024  # entries of one tensor that a program takes
TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip

_WIDTH, _BLOCK = tl.constexpr(WIDTH), tl.constexpr(BLOCK)
# The columns of a row, as Triton wants constants.
_SIZE, _THETA, _GRAD, _V, _FIRST, _SECOND = map(tl.constexpr, range(len(ADDRESSES)))
(
    _LOW0, _HIGH0, _DELTA0, _LOW, _HIGH, _DELTA, _LR, _BETA1, _BETA2, _EPS, _ROOT, _PACE, _DECAY, _SIGN, _SHRINK,
) = map(tl.constexpr, range(len(ADDRESSES), WIDTH))  # fmt: skip


@triton.jit
def _clamp(x, low, high):
    """A NaN stays one."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(tl.maximum(x, low, propagate_nan=nan), high, propagate_nan=nan)


@triton.jit
def _number(row, i, dtype: tl.constexpr):
    return tl.load(row + i).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def step(
    table, blocks, RULE: tl.constexpr, PRIMAL: tl.constexpr, THETA: tl.constexpr, DUAL: tl.constexpr,
    ROUNDING: tl.constexpr,
):  # fmt: skip
    """`RULE`, of kernels/step.py, moves v and θ follows; with `PRIMAL` there is no v (ProxSGD).

    `blocks`: for every program the tensor's row and which block of it. `THETA`, `DUAL`: the types of θ and g, and of v
    and the moments. `ROUNDING`: how far inside of the threshold a zero is put.
    """
    i = tl.program_id(0)
    row = table + tl.load(blocks + 2 * i) * _WIDTH
    at = tl.load(blocks + 2 * i + 1) * _BLOCK + tl.arange(0, _BLOCK)
    inside = at < tl.load(row + _SIZE)
    p = tl.load(row + _THETA).to(tl.pointer_type(THETA)) + at
    grad = tl.load(row + _GRAD).to(tl.pointer_type(THETA)) + at
    dual = tl.load(row + _V).to(tl.pointer_type(DUAL)) + at
    first = tl.load(row + _FIRST).to(tl.pointer_type(DUAL)) + at
    second = tl.load(row + _SECOND).to(tl.pointer_type(DUAL)) + at
    low, high, delta = _number(row, _LOW, DUAL), _number(row, _HIGH, DUAL), _number(row, _DELTA, DUAL)
    written = tl.load(p, inside, 0.0)
    theta = written.to(DUAL)
    if PRIMAL:
        x = theta
    else:
        low0, high0, delta0 = _number(row, _LOW0, DUAL), _number(row, _HIGH0, DUAL), _number(row, _DELTA0, DUAL)
        v = tl.load(dual, inside, 0.0)
        expected = delta0 * (v - _clamp(v, low0, high0))
        # Where θ was changed from outside v follows; where it is zero, v keeps what it remembers, a hair inside.
        memory = _clamp(v - expected / delta0, low, high)
        end = tl.where(theta > 0, high, tl.where(low < -high, memory, low))
        fresh = tl.where(theta != 0, theta / delta + end, ROUNDING * memory)
        x = tl.where(expected.to(THETA) != written, fresh, v)
    if RULE != "HOLD":
        lr, beta1 = _number(row, _LR, DUAL), _number(row, _BETA1, DUAL)
        g = _number(row, _SIGN, DUAL) * tl.load(grad, inside, 0.0).to(DUAL) + _number(row, _DECAY, DUAL) * theta
        if RULE == "PLAIN":
            x -= lr * g
        else:
            m = tl.load(first, inside, 0.0)
            if RULE == "PAPER":
                m = beta1 * m + (1 - beta1) * lr * g
                x -= m
            elif RULE == "SGD":
                m = beta1 * m + g
                x -= lr * m
            elif RULE == "NESTEROV":
                m = beta1 * m + g
                x -= lr * (g + beta1 * m)
            else:
                beta2, eps = _number(row, _BETA2, DUAL), _number(row, _EPS, DUAL)
                m += (1 - beta1) * (g - m)
                s = tl.load(second, inside, 0.0)
                s = beta2 * s + (1 - beta2) * g * g
                tl.store(second, s, inside)
                if RULE == "ADAMW":
                    x -= _number(row, _SHRINK, DUAL) * theta
                x += _number(row, _PACE, DUAL) * m / (tl.sqrt(s) / _number(row, _ROOT, DUAL) + eps)
            tl.store(first, m, inside)
    if PRIMAL:
        tl.store(p, (x - _clamp(x, low, high)).to(THETA), inside)
    else:
        tl.store(dual, x, inside)
        tl.store(p, (delta * (x - _clamp(x, low, high))).to(THETA), inside)
