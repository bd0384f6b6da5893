"""Restriction to the live weights: the pattern, and the layer that computes with them alone."""

from __future__ import annotations

import pytest
import torch
from cases import FLOATS, pairwise
from torch import Tensor
from torch.nn import functional as F

from torch_bregman.kernels import BAND
from torch_bregman.multilevel.linear import Pattern, sparse_linear
from torch_bregman.part import MANY, Part, beyond

pytest.importorskip("numba")

SHAPES = [(1, 1), (10, 7), (33, 129), (64, 20), (5, 300)]
BATCHES = [1, 2, 15, 16, 17, 128, 137, 300]


def sparse(shape: tuple[int, int], density: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    return weight * (torch.rand(shape, generator=generator) < density)


@pairwise(
    {"shape": SHAPES, "batch": BATCHES, "density": [0.0, 0.1, 1.0], "with_bias": [True, False], "dtype": FLOATS},
    strength=3,  # the kernels go by shape, batch and dtype together
)
def test_it_is_the_dense_layer_with_masked_gradients(
    shape: tuple[int, int], batch: int, density: float, with_bias: bool, dtype: torch.dtype
) -> None:
    weight = sparse(shape, density, dtype).requires_grad_()
    pattern = Pattern(weight)
    assert len(pattern) == int((weight != 0).sum())
    values = pattern.restrict(weight).requires_grad_()
    bias = torch.randn(shape[0], dtype=dtype, requires_grad=True) if with_bias else None
    x, upstream = (
        torch.randn(batch, shape[1], dtype=dtype, requires_grad=True),
        torch.randn(batch, shape[0], dtype=dtype),
    )
    got = sparse_linear(x, values, bias, pattern)
    wanted = F.linear(x, weight, bias)
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, wanted, **tolerance)
    inputs = [x, values] + ([bias] if bias is not None else [])
    dense = [x, weight] + ([bias] if bias is not None else [])
    gradients, full = torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(wanted, dense, upstream)
    torch.testing.assert_close(gradients[0], full[0], **tolerance)
    torch.testing.assert_close(gradients[1], pattern.restrict(full[1]), **tolerance)
    if bias is not None:
        torch.testing.assert_close(gradients[2], full[2], **tolerance)


@pytest.mark.parametrize("batch", [1, 15, 128, 137])
@pytest.mark.parametrize("shape", [(33, 129), (40, 2000)])
def test_a_relu_and_further_entries_in_the_same_pass(shape: tuple[int, int], batch: int) -> None:
    weight = sparse(shape, 0.2).requires_grad_()
    pattern, near = Pattern(weight), Pattern(weight, (weight == 0).view(-1).nonzero().view(-1)[::3])
    values = torch.cat([pattern.restrict(weight), torch.full((len(near),), 7.0, dtype=torch.float64)]).requires_grad_()
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(batch, shape[1], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(batch, shape[0], dtype=torch.float64)
    got, wanted = sparse_linear(x, values, bias, pattern, near=near, relu=True), F.linear(x, weight, bias).relu()
    torch.testing.assert_close(got, wanted)
    ours = torch.autograd.grad(got, [x, values, bias], upstream)
    theirs = torch.autograd.grad(wanted, [x, weight, bias], upstream)
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], torch.cat([pattern.restrict(theirs[1]), near.restrict(theirs[1])]))
    torch.testing.assert_close(ours[2], theirs[2])
    odd = torch.full((batch, shape[1]), float("inf"), dtype=torch.float64)
    torch.testing.assert_close(
        sparse_linear(odd, values, bias, pattern, near=near, relu=True),
        sparse_linear(odd, values, bias, pattern, near=near).relu(),
        equal_nan=True,
    )


def test_gradients_by_finite_differences() -> None:
    weight = sparse((7, 9), 0.3)
    pattern = Pattern(weight)
    arguments = (torch.randn(5, 9, dtype=torch.float64), pattern.restrict(weight), torch.randn(7, dtype=torch.float64))
    inputs = [a.requires_grad_() for a in arguments]
    for relu in (False, True):

        def layer(x: Tensor, values: Tensor, bias: Tensor, relu: bool = relu) -> Tensor:
            return sparse_linear(x, values, bias, pattern, relu=relu)

        assert torch.autograd.gradcheck(layer, inputs)
        assert torch.autograd.gradgradcheck(layer, inputs)


def test_layers_in_a_row_pass_their_layout_on() -> None:
    one, two = sparse((40, 30), 0.2, torch.float32), sparse((20, 40), 0.2, torch.float32, seed=1)
    first, second = Pattern(one), Pattern(two)
    hidden = sparse_linear(torch.randn(64, 30), first.restrict(one), None, first).relu()
    assert hidden.t().is_contiguous()
    torch.testing.assert_close(
        sparse_linear(hidden, second.restrict(two), None, second), F.linear(hidden, two), rtol=1e-4, atol=1e-5
    )


def test_restrict_and_prolong_are_inverse_on_the_support_and_leave_the_rest_alone() -> None:
    weight, dual = sparse((30, 20), 0.1), torch.randn(30, 20, dtype=torch.float64)
    pattern = Pattern(weight)
    assert pattern.density == pytest.approx(int((weight != 0).sum()) / 600)
    before, held = dual.clone(), pattern.restrict(dual)
    pattern.prolong(held + 1, dual)
    assert torch.equal(dual, torch.where(weight != 0, before + 1, before))
    target = torch.randn(30, 20, dtype=torch.float64)
    storage = target.data_ptr()
    pattern.prolong(pattern.restrict(weight), target, zeros=True)
    assert torch.equal(target, weight)
    assert target.data_ptr() == storage
    across = torch.randn(20, 30, dtype=torch.float64).t()
    pattern.prolong(pattern.restrict(weight), across, zeros=True)
    assert torch.equal(across, weight)
    assert torch.equal(pattern.restrict(across), pattern.restrict(weight))


def test_threads_do_not_change_a_bit() -> None:
    weight = sparse((300, 200), 0.05, torch.float32)
    pattern = Pattern(weight)
    x, upstream, results = torch.randn(128, 200), torch.randn(128, 300), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            a, values = x.clone().requires_grad_(), pattern.restrict(weight).requires_grad_()
            y = sparse_linear(a, values, None, pattern)
            results.append([y.detach(), *torch.autograd.grad(y, [a, values], upstream)])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_named() -> None:
    weight = sparse((4, 3), 0.5, torch.float32)
    pattern = Pattern(weight)
    values, x = pattern.restrict(weight), torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"weight.*\(2, 3, 4\)"):
        Pattern(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 4\); expected \[batch, 3\]"):
        sparse_linear(torch.randn(2, 4), values, None, pattern)
    with pytest.raises(ValueError, match=r"`values` has shape"):
        sparse_linear(x, values[:-1], None, pattern)
    with pytest.raises(ValueError, match=r"`bias` has shape \(3,\)"):
        sparse_linear(x, values, torch.zeros(3), pattern)
    with pytest.raises(ValueError, match=r"`values` is torch\.float64"):
        sparse_linear(x, values.double(), None, pattern)
    with pytest.raises(ValueError, match=r"`x` is torch\.bfloat16"):
        sparse_linear(x.bfloat16(), values.bfloat16(), None, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", [0.0, 1.5])
def test_large_tensors_are_searched_and_moved_by_kernels_alike(bound: float, dtype: torch.dtype) -> None:
    weight = sparse((700, 613), 0.3, dtype)
    flat = weight.view(-1)
    index = beyond(weight, bound)
    assert torch.equal(index, (flat.abs() > bound).nonzero().squeeze(1))
    assert len(index) > MANY or bound
    where, other = Part(weight, (), index), torch.randn(700, 613, dtype=dtype)
    assert torch.equal(where.restrict(other), other.view(-1)[index])
    target = other.clone()
    where.prolong(torch.arange(len(index), dtype=dtype), target)
    wanted = other.view(-1).clone()
    wanted[index] = torch.arange(len(index), dtype=dtype)
    assert torch.equal(target.view(-1), wanted)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "gaps"])
@pytest.mark.parametrize("spans", [(), (1, 2, 3), (0, 2, 3), (2, 3)])
def test_supports_do_not_depend_on_the_layout(layout: str, spans: tuple[int, ...]) -> None:
    plain = sparse((6, 5, 12), 0.1).view(6, 5, 3, 4)
    full = {
        "contiguous": plain.clone(),
        "channels_last": plain.clone(memory_format=torch.channels_last),
        "transposed": plain.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "gaps": torch.stack([plain, plain], -1)[..., 0],
    }[layout]
    assert torch.equal(full, plain)
    one, two = Part(plain, spans), Part(full, spans)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.restrict(plain), two.restrict(full))
    two.prolong(2 * one.restrict(plain), full)
    live = (plain != 0).any(dim=spans, keepdim=True).expand_as(plain) if spans else plain != 0
    assert torch.equal(full, torch.where(live, 2 * plain, plain))
    assert one.size == int(live.sum())
    two.prolong(one.restrict(plain), full.fill_(1.0), zeros=True)
    assert torch.equal(full, torch.where(live, plain, 0.0))


@pytest.mark.parametrize("shape", [(5, 3), (130, 90), (900, 2000), (2000, 900)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.6])
def test_compressed_rows_of_the_matrix_and_its_transpose(shape: tuple[int, int], density: float) -> None:
    weight = sparse(shape, density)
    rows, columns = Pattern(weight).lists
    for lists, matrix in ((rows, weight), (columns, weight.t())):
        out = len(matrix)
        ends = lists.start[:: lists.blocks]
        assert torch.equal(torch.diff(ends), (matrix != 0).sum(1))
        entries = (matrix != 0).nonzero()
        assert torch.equal(lists.column.long(), entries[:, 1])
        assert len(lists.start) == out * lists.blocks + 1
        assert lists.rows == out
    values = Pattern(weight).restrict(weight)
    assert columns.source is not None
    assert columns.place is not None
    band = columns.start[:: BAND * columns.blocks]
    fetched = torch.empty_like(values)
    for begin, end in zip(band, [*band[1:], len(values)], strict=True):
        fetched[begin + columns.place[begin:end].long()] = values[columns.source[begin:end].long()]
    assert torch.equal(fetched, weight.t()[weight.t() != 0])
