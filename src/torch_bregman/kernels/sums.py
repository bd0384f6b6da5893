"""What the loops of sparse products share: sums of several positions stay in registers while the weights pass by."""

from __future__ import annotations

from .step import inlined
from .vector import fma, load


@inlined
def add_four(v, x, i0, i1, i2, i3, s0, s1, s2, s3):
    """Four sums, each with v times the line of x that begins at its index."""
    return fma(v, load(x, i0), s0), fma(v, load(x, i1), s1), fma(v, load(x, i2), s2), fma(v, load(x, i3), s3)
