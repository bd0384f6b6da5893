"""Unstructured supports: the live weights of a matrix as one vector, and the layer that computes with them alone."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import kernels
from ..kernels import BAND, DTYPES, threads
from ..part import Part
from .twice import gradients, placed

BLOCK = 768  # columns of a block: at 128 floats of the batch, 384 KB of X
ENTRIES = 16  # per row and block, at least: the sums are read and written once for each
ALONE = 1 << 15  # multiplications up to which a second thread does not pay


class Pattern(Part):
    """Where a matrix W [out, in] is not zero, entry by entry, as compressed rows of W and of Wᵀ.

    Raises:
        ValueError: `weight` is not a matrix, or has 2³¹ live entries or more.
    """

    def __init__(self, weight: Tensor, index: Tensor | None = None) -> None:
        if weight.dim() != 2:
            raise ValueError(f"`weight` has shape {tuple(weight.shape)}; expected a matrix [out, in].")
        super().__init__(weight, (), index)
        if len(self) >= 1 << 31:
            raise ValueError(f"`weight` has {len(self):,} live entries; expected fewer than 2^31.")
        self.shape = tuple(weight.shape)

    @functools.cached_property
    def lists(self) -> tuple[Lists, Lists]:
        """Compressed rows of W and of Wᵀ."""
        rows, (start, row, source, place) = self._compress(transposed=True)
        out, n = self.shape
        high = -(-out // self._block(out)) if out else 1
        bands = start[:: BAND * high]
        longest = int(torch.diff(bands, append=start[-1:]).max()) if n else 0
        return rows, Lists(n, start, row, high, source, place, longest)

    @functools.cached_property
    def rows(self) -> Lists:
        """Compressed rows of W, where nothing is multiplied with Wᵀ."""
        return self._compress(transposed=False)[0]

    def _compress(self, *, transposed: bool) -> tuple[Lists, list[Tensor]]:
        from ..kernels import csr

        out, n = self.shape
        across = self._block(n)
        made = csr.built()(self.index.numpy(), out, n, across, self._block(out), transposed)
        start, column, *others = map(torch.from_numpy, made)
        return Lists(out, start, column, -(-n // across)), others

    def _block(self, columns: int) -> int:
        """Columns whose rows of X stay in the second cache while a chunk of rows passes by; with few entries, more."""
        block = max(BLOCK, round(ENTRIES / max(self.density, 1e-9)))
        return block if 1.5 * block < columns else max(columns, 1)


class Lists(NamedTuple):
    """Where the blocks of rows start, and the columns of the entries; `source` and `place`: see kernels/csr.py."""

    rows: int
    start: Tensor
    column: Tensor
    blocks: int
    source: Tensor | None = None
    place: Tensor | None = None
    longest: int = 0


def _run(
    loop: Any, lists: Lists, values: Tensor, x: Tensor, y: Tensor, bias: Tensor | None = None, relu: bool = False
) -> None:
    """One kernel over the rows of `lists`; x and y are batch-last."""
    work = len(lists.column) * x.shape[1]
    chunk = BAND if lists.source is not None else max(1, min(BAND, lists.rows // 16))
    tensors = (lists.start, lists.column, values, x, y, bias, lists.source, lists.place)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    head = np.array([0, lists.rows, chunk, x.shape[1], *addresses, lists.longest, lists.blocks, relu], np.int64)
    threads.run(loop, head.ctypes.data, alone=work <= ALONE)


def _batch_last(x: Tensor) -> Tensor:
    """[batch, n] as [n, batch] without gaps; no copy if it lies so already, as what this layer returns does."""
    return x.detach().t().contiguous()


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, whole: nn.Parameter | None,
        near: Pattern | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        from ..kernels import csr

        xt = _batch_last(x)
        y = xt.new_empty(pattern.shape[0], xt.shape[1])
        row = None if bias is None else bias.contiguous()
        _run(csr.product(DTYPES[x.dtype]), pattern.lists[0], values.contiguous(), xt, y, row, relu)
        ctx.pattern, ctx.near, ctx.relu, out = pattern, near, relu, y.t()
        ctx.save_for_backward(xt, values, out if relu else None, x, bias, whole)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ..kernels import csr

        (grad,) = grads
        xt, values, out, x, bias, whole = ctx.saved_tensors
        if torch.is_grad_enabled():

            def dense(x: Tensor, values: Tensor, bias: Tensor | None, whole: Tensor | None) -> Tensor:
                weight = placed(values, ctx.pattern, ctx.near)
                y = functional.linear(x, weight if whole is None else weight + (whole - whole.detach()), bias)
                return y.relu() if ctx.relu else y

            needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
            *first, to_whole = gradients(dense, (x, values, bias, whole), needs, grad)
            return (*first, None, to_whole, None, None)
        name, pattern = DTYPES[xt.dtype], ctx.pattern
        gt, values = _batch_last(grad), values.contiguous()
        if out is not None:
            gt = torch.ops.aten.threshold_backward(gt, out.t(), 0)
        to_x = to_values = to_bias = to_whole = None
        if ctx.needs_input_grad[0]:
            to_x = torch.empty_like(xt)
            _run(csr.product(name), pattern.lists[1], values, gt, to_x)
            to_x = to_x.t()
        if ctx.needs_input_grad[1]:
            to_values = torch.empty_like(values)
            _run(csr.sampled(name), pattern.lists[0], to_values[: len(pattern)], xt, gt)
            if ctx.near is not None:
                _run(csr.sampled(name), ctx.near.rows, to_values[len(pattern) :], xt, gt)
        if ctx.needs_input_grad[2]:
            to_bias = gt.sum(1)
        if ctx.needs_input_grad[4]:
            to_whole = gt @ xt.t()
        return to_x, to_values, to_bias, None, to_whole, None, None


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern: Pattern, *,
    whole: nn.Parameter | None = None, near: Pattern | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + b [batch, out], where W [out, in] has `values` on `pattern` and zeros elsewhere.

    Forward, the gradient to x and the gradient to `values` each cost 2·batch·len(pattern) operations; nothing of the
    size of W is made. What comes out lies batch-last in memory, and the next layer takes it without a copy.

    Args:
        x: [batch, in], float32 or float64, in the memory of this machine.
        values: the live weights, in the order of `pattern.restrict`.
        bias: [out] or None.
        whole: W itself; then its gradient is that of all its entries, by a dense product. Its values are not looked at.
        near: further entries of W, all zero, whose gradient is wanted too: `values` goes on with theirs, which are not
            looked at.
        relu: max(y, 0) instead, without another pass over y.

    Raises:
        ImportError: without Numba (extra `fast`).
        ValueError: shapes or dtypes that do not fit.
    """
    kernels.require("sparse_linear")
    out, n = pattern.shape
    if x.dim() != 2 or x.shape[1] != n:
        raise ValueError(f"`x` has shape {tuple(x.shape)}; expected [batch, {n}].")
    check_values(values, pattern, near)
    if bias is not None and tuple(bias.shape) != (out,):
        raise ValueError(f"`bias` has shape {tuple(bias.shape)}; expected ({out},).")
    for name, tensor in (("x", x), ("values", values), ("bias", bias), ("whole", whole)):
        if tensor is not None and (
            tensor.dtype not in DTYPES or tensor.dtype != x.dtype or tensor.device.type != "cpu"
        ):
            raise ValueError(
                f"`{name}` is {tensor.dtype} on {tensor.device}; expected float32 or float64, all alike, on a CPU."
            )
    return _SparseLinear.apply(x, values, bias, pattern, whole, near, relu)  # type: ignore[no-untyped-call]


def check_values(values: Tensor, pattern: Part, near: Part | None) -> None:
    """ValueError unless `values` has an entry for each of the pattern's and each of `near`."""
    wanted = len(pattern) + (0 if near is None else len(near))
    if tuple(values.shape) != (wanted,):
        raise ValueError(f"`values` has shape {tuple(values.shape)}; expected ({wanted},).")
