"""The pass over memory of step.py for GPUs, in Triton: one launch for all tensors of a parameter group.

Here θ is read and compared in full, as the readable step does; skipping cache lines is for CPUs. A table has a row of
`WIDTH` int64 per tensor: SIZE, the addresses of θ, g, v, m₁, m₂, and the bits of the float64 numbers named in NAMES.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

NAMES = (
    "LOW0", "HIGH0", "DELTA0", "LOW", "HIGH", "DELTA", "LR", "BETA1", "BETA2", "EPS", "ROOT", "PACE", "DECAY", "SIGN",
    "SHRINK",
)  # fmt: skip
ADDRESSES = 6  # SIZE among them
WIDTH = ADDRESSES + len(NAMES)
BLOCK = 1024  # entries of one tensor that a program takes
TYPES = {
    torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip

_WIDTH, _BLOCK = tl.constexpr(WIDTH), tl.constexpr(BLOCK)


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
    inside = at < tl.load(row)
    p = tl.load(row + 1).to(tl.pointer_type(THETA)) + at
    grad = tl.load(row + 2).to(tl.pointer_type(THETA)) + at
    dual = tl.load(row + 3).to(tl.pointer_type(DUAL)) + at
    first = tl.load(row + 4).to(tl.pointer_type(DUAL)) + at
    second = tl.load(row + 5).to(tl.pointer_type(DUAL)) + at
    low, high, delta = _number(row, 9, DUAL), _number(row, 10, DUAL), _number(row, 11, DUAL)
    written = tl.load(p, inside, 0.0)
    theta = written.to(DUAL)
    if PRIMAL:
        x = theta
    else:
        low0, high0, delta0 = _number(row, 6, DUAL), _number(row, 7, DUAL), _number(row, 8, DUAL)
        v = tl.load(dual, inside, 0.0)
        expected = delta0 * (v - _clamp(v, low0, high0))
        # Where θ was changed from outside v follows; where it is zero, v keeps what it remembers, a hair inside.
        memory = _clamp(v - expected / delta0, low, high)
        end = tl.where(theta > 0, high, tl.where(low < -high, memory, low))
        fresh = tl.where(theta != 0, theta / delta + end, ROUNDING * memory)
        x = tl.where(expected.to(THETA) != written, fresh, v)
    if RULE != "HOLD":
        lr, beta1 = _number(row, 12, DUAL), _number(row, 13, DUAL)
        g = _number(row, 19, DUAL) * tl.load(grad, inside, 0.0).to(DUAL) + _number(row, 18, DUAL) * theta
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
                beta2, eps = _number(row, 14, DUAL), _number(row, 15, DUAL)
                m += (1 - beta1) * (g - m)
                s = tl.load(second, inside, 0.0)
                s = beta2 * s + (1 - beta2) * g * g
                tl.store(second, s, inside)
                if RULE == "ADAMW":
                    x -= _number(row, 20, DUAL) * theta
                x += _number(row, 17, DUAL) * m / (tl.sqrt(s) / _number(row, 16, DUAL) + eps)
            tl.store(first, m, inside)
    if PRIMAL:
        tl.store(p, (x - _clamp(x, low, high)).to(THETA), inside)
    else:
        tl.store(dual, x, inside)
        tl.store(p, (delta * (x - _clamp(x, low, high))).to(THETA), inside)
