"""The convolution over the live weights and the pooling beside it, against torch's dense ones."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from cases import FLOATS, pairwise
from torch import Tensor
from torch.nn import functional as F

from torch_bregman.multilevel.conv import ConvPattern, max_pool2d, sparse_conv2d
from torch_bregman.multilevel.linear import Pattern, sparse_linear

pytest.importorskip("numba")

CHANNELS, OUT = 4, 8
KINDS = list(
    itertools.product((1, 2, 3), (0, 1, 2, (1, 2)), (1, 2), (1, 2, CHANNELS), ((1, 1), (3, 3), (5, 5), (3, 1)))
)
LAYOUTS = ["NCHW", "channels_last", "batch_last"]


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=dtype)
    return weight * (torch.rand(shape, generator=generator) < density)


def batch_last(x: Tensor) -> Tensor:
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def laid(x: Tensor, layout: str) -> Tensor:
    """x in another order in memory."""
    if layout == "batch_last":
        return batch_last(x)
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def check(weight: Tensor, x: Tensor, upstream_layout: str, bias: Tensor | None, *arguments: Any) -> None:
    """Forward and all gradients against F.conv2d."""
    tolerance = {"rtol": 1e-4, "atol": 3e-4} if x.dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    weight, x = weight.requires_grad_(), x.requires_grad_()
    pattern = ConvPattern(weight)
    values = pattern.restrict(weight).requires_grad_()
    extra = [] if bias is None else [bias.requires_grad_()]
    got = sparse_conv2d(x, values, bias, pattern, *arguments)
    wanted = F.conv2d(x, weight, bias, *arguments)
    torch.testing.assert_close(got, wanted, **tolerance)
    upstream = laid(torch.randn_like(wanted), upstream_layout)
    gradients = torch.autograd.grad(got, [x, values, *extra], upstream)
    full = list(torch.autograd.grad(wanted, [x, weight, *extra], upstream))
    full[1] = pattern.restrict(full[1])
    for a, b in zip(gradients, full, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 16, 33])
def test_it_is_the_dense_convolution_with_masked_gradients(batch: int, dtype: torch.dtype) -> None:
    for at, (stride, padding, dilation, groups, kernel) in enumerate(KINDS):
        rng = random.Random(f"{batch} {dtype} {at}")
        if rng.random() < 0.6:
            continue
        weight = sparse((OUT, CHANNELS // groups, *kernel), rng.choice([0.0, 0.05, 0.5, 1.0]), dtype, seed=at)
        x = laid(
            torch.randn(batch, CHANNELS, rng.choice([9, 12, 13]), rng.choice([9, 11, 14])).to(dtype), LAYOUTS[at % 3]
        )
        bias = torch.randn(OUT, dtype=dtype) if rng.random() < 0.5 else None
        check(weight, x, rng.choice(LAYOUTS), bias, stride, padding, dilation, groups)


@pytest.mark.parametrize("stride", [1, 2])
def test_large_images_in_several_pieces(stride: int) -> None:
    weight = sparse((8, 16, 3, 3), 0.2)
    check(weight, laid(torch.randn(20, 16, 45, 37).double(), "batch_last"), "NCHW", torch.randn(8).double(), stride, 1)
    weight = sparse((4, 256, 3, 3), 0.05)
    check(weight, torch.randn(3, 256, 7, 41).double(), "batch_last", None, stride, 1)


def test_padding_by_name() -> None:
    weight, x = sparse((5, 3, 3, 5), 0.5), torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for padding in ("same", "valid"):
        check(weight.detach().clone(), x.clone(), "NCHW", None, 1, padding, 2)


@pytest.mark.parametrize(("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, (1, 0), 1, 2), (2, 2, 2, 1)])
def test_gradients_by_finite_differences(stride: int, padding: Any, dilation: int, groups: int) -> None:
    weight = sparse((4, 4 // groups, 3, 2), 0.4)
    pattern = ConvPattern(weight)
    arguments = (torch.randn(3, 4, 5, 6, dtype=torch.float64), pattern.restrict(weight), torch.randn(4).double())
    inputs = [a.requires_grad_() for a in arguments]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(
            lambda x, values, bias: sparse_conv2d(x, values, bias, pattern, stride, padding, dilation, groups), inputs
        )


def test_restrict_and_prolong_keep_the_order_of_the_matrix_in_every_layout() -> None:
    weight = sparse((6, 5, 3, 3), 0.2)
    pattern, matrix = ConvPattern(weight), Pattern(weight.flatten(1))
    assert len(pattern) == len(matrix) == int((weight != 0).sum())
    assert pattern.density == pytest.approx(len(pattern) / weight.numel())
    assert torch.equal(pattern.index, matrix.index)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ConvPattern(last).index, pattern.index)
    assert torch.equal(pattern.restrict(last), matrix.restrict(weight.flatten(1)))
    for target in (torch.randn_like(weight), torch.randn_like(last)):
        before, storage = target.clone(), target.data_ptr()
        pattern.prolong(pattern.restrict(weight), target, zeros=False)
        assert torch.equal(target, torch.where(weight != 0, weight, before))
        pattern.prolong(pattern.restrict(weight), target, zeros=True)
        assert torch.equal(target, weight)
        assert target.data_ptr() == storage


def test_threads_do_not_change_a_bit() -> None:
    weight, image = sparse((16, 16, 3, 3), 0.2, torch.float32), torch.randn(70, 16, 20, 20)
    pattern, upstream, results = ConvPattern(weight), torch.randn(70, 16, 20, 20), []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            x, values = image.clone().requires_grad_(), pattern.restrict(weight).requires_grad_()
            y = sparse_conv2d(x, values, None, pattern, padding=1)
            pooled = max_pool2d(y, 3, 2)
            parts = torch.autograd.grad(y, [x, values], upstream, retain_graph=True)
            results.append([y, pooled, *parts, *torch.autograd.grad(pooled.square().sum(), [x, values])])
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pairwise({"batch": [1, 16, 37], "layout": LAYOUTS, "dtype": FLOATS})
def test_pooling_takes_the_first_of_equals(batch: int, layout: str, dtype: torch.dtype) -> None:
    x = torch.randint(-2, 3, (batch, 3, 11, 14)).to(dtype)
    x.view(-1)[::41], x.view(-1)[1::97], x[0, 0, :5] = float("nan"), float("inf"), float("-inf")
    x = laid(x, layout).requires_grad_()
    for sizes in ((2,), (3, 2), (3, 2, 1), (2, 1), ((3, 2), (1, 3), (1, 0)), (2, 3)):
        got, wanted = max_pool2d(x, *sizes), F.max_pool2d(x, *sizes)
        assert batch_last(got).data_ptr() == got.data_ptr() or batch == 1
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        upstream = torch.randn_like(wanted)
        (a,), (b,) = torch.autograd.grad(got, x, upstream), torch.autograd.grad(wanted, x, upstream)
        torch.testing.assert_close(a, b)
        got, wanted = max_pool2d(x - 1, *sizes, relu=True), F.max_pool2d((x - 1).relu(), *sizes)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
        (a,), (b,) = torch.autograd.grad(got, x, upstream), torch.autograd.grad(wanted, x, upstream)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("relu", [False, True])
def test_the_gradient_of_a_pooling_has_a_gradient(relu: bool) -> None:
    x = torch.randn(3, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    for sizes in ((2,), (3, 2, 1), ((3, 2), (1, 3), (1, 0))):
        assert torch.autograd.gradgradcheck(lambda x, sizes=sizes: max_pool2d(x, *sizes, relu=relu), (x,))


def test_layers_in_a_row_pass_their_layout_on() -> None:
    one, two = sparse((8, 3, 3, 3), 0.5, torch.float32), sparse((5, 8 * 25), 0.2, torch.float32)
    first, second, x = ConvPattern(one), Pattern(two), torch.randn(33, 3, 12, 12)
    y = sparse_conv2d(x, first.restrict(one), None, first)
    assert y.permute(1, 2, 3, 0).is_contiguous()
    hidden = max_pool2d(y.relu(), 2)
    flat = hidden.flatten(1)
    assert flat.data_ptr() == hidden.data_ptr()
    assert flat.t().is_contiguous()
    got = sparse_linear(flat, second.restrict(two), None, second)
    wanted = F.linear(F.max_pool2d(F.conv2d(x, one).relu(), 2).flatten(1), two)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    weight = sparse((4, 3, 3, 3), 0.5, torch.float32)
    pattern, x = ConvPattern(weight), torch.randn(2, 3, 8, 8)
    values = pattern.restrict(weight)
    with pytest.raises(ValueError, match=r"`weight` has shape \(4, 27\); expected \[out, in/groups, kh, kw\]"):
        ConvPattern(weight.flatten(1))
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 4, 8, 8\); expected \[batch, 3, height, width\]"):
        sparse_conv2d(torch.randn(2, 4, 8, 8), values, None, pattern)
    with pytest.raises(ValueError, match=r"`x` has shape \(3, 8, 8\)"):
        sparse_conv2d(x[0], values, None, pattern)
    with pytest.raises(ValueError, match=r"`x` has shape \(2, 3, 8, 2\); expected images"):
        sparse_conv2d(x[..., :2], values, None, pattern)
    with pytest.raises(ValueError, match=r"`values` has shape"):
        sparse_conv2d(x, values[:-1], None, pattern)
    with pytest.raises(ValueError, match=r"`bias` has shape \(3,\); expected \(4,\)"):
        sparse_conv2d(x, values, torch.zeros(3), pattern)
    with pytest.raises(ValueError, match=r"`values` is torch\.float64"):
        sparse_conv2d(x, values.double(), None, pattern)
    with pytest.raises(ValueError, match=r"`x` is torch\.bfloat16"):
        sparse_conv2d(x.bfloat16(), values.bfloat16(), None, pattern)
    for name, value in (("stride", 0), ("dilation", (1, 2, 3)), ("padding", -1), ("padding", "half"), ("groups", 3)):
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}".replace("(", r"\(").replace(")", r"\)")):
            sparse_conv2d(x, values, None, pattern, **{name: value})  # type: ignore[arg-type]
    for arguments in ({"stride": 2}, {"dilation": 1}):
        even = ConvPattern(torch.ones(4, 3, 2, 2))
        with pytest.raises(ValueError, match=r"`padding` is 'same'"):
            sparse_conv2d(x, even.restrict(torch.ones(4, 3, 2, 2)), None, even, padding="same", **arguments)
    with pytest.raises(ValueError, match=r"`padding` is 2; expected at most half the kernel \(3, 3\)"):
        max_pool2d(x, 3, padding=2)
    with pytest.raises(ValueError, match=r"`x` is torch\.int64"):
        max_pool2d(x.long(), 2)
