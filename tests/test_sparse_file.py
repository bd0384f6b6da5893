"""The sparse file: every bit comes back, nothing hostile gets in, and what fails leaves things as they were."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import torch_bregman as tb
from torch_bregman.export import patterns
from torch_bregman.export.descriptions import describe
from torch_bregman.export.file import METADATA
from torch_bregman.export.load import load_sparse
from torch_bregman.export.read import read_sparse
from torch_bregman.export.save import Saved, save_sparse
from torch_bregman.network import Kind
from torch_bregman.network.attention import Attention
from torch_bregman.network.kinds import REGISTRY

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
          torch.float8_e4m3fn, torch.complex64, torch.complex128]  # fmt: skip
SHAPES = [(), (0,), (3, 0, 2), (1,), (7,), (8,), (9, 1), (40, 50), (5, 4, 3, 3), (1, 3000)]


class Holder(nn.Module):
    """Any tensors as a model: floating point ones as parameters, the others as buffers."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)


class Net(nn.Module):
    """A bit of everything, small."""

    def __init__(self, channels: int = 6, hidden: int = 20) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, hidden)
        self.out = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.norm(self.conv(x)).relu().mean((2, 3))).relu())


class Rich(Net):
    """With a tied layer, complex numbers and negative zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Linear(20, 2, bias=False), nn.Linear(2, 20))
        self.twin = self.fc
        self.register_buffer("waves", torch.zeros(9, 9, dtype=torch.complex64))

    @classmethod
    def drawn(cls) -> Rich:
        torch.manual_seed(3)
        net = cls()
        tb.sparse_init_(net, 0.15)
        net.fc.weight.data *= -(torch.rand_like(net.fc.weight) < 0.6).float()
        net.waves[3:5] = torch.randn(2, 9, dtype=torch.complex64)
        return net


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(a, b) for a, b in itertools.pairwise(widths)])


def raw(tensor: Tensor) -> bytes:
    tensor = tensor.detach().resolve_conj().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in model.state_dict().items()}


def draw(shape: tuple[int, ...], dtype: torch.dtype, density: float, seed: int = 0) -> Tensor:
    """Random bits that are values of the dtype, zero where the mask says so."""
    rng = np.random.default_rng(seed)
    n = math.prod(shape)
    mask = rng.random((n, 1)) < density
    if dtype == torch.bool:
        return torch.from_numpy(mask).reshape(shape)
    each = torch.empty(0, dtype=dtype).element_size()
    values = rng.integers(0, 256, (n, each), dtype=np.uint8) * mask
    return torch.from_numpy(values.reshape(-1)).view(dtype).reshape(shape) if n else torch.zeros(shape, dtype=dtype)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


def sparse_net(density: float = 0.3, seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    net = Net(**sizes)
    tb.sparse_init_(net, density)
    net.norm.running_mean.normal_()
    return net


# ---------------------------------------------------------------------- every bit comes back


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_and_shape_comes_back(dtype: torch.dtype, path: Path) -> None:
    for density in (0.0, 0.002, 0.05, 0.3, 0.6, 1.0):
        model = Holder(**{f"t{i}": draw(shape, dtype, density, i) for i, shape in enumerate(SHAPES)})
        saved = save_sparse(model, path)
        fresh = Holder(**{name: torch.ones_like(t) for name, t in model.state_dict().items()})
        places = {name: t.data_ptr() for name, t in fresh.state_dict().items()}
        assert load_sparse(fresh, path) is fresh
        assert bits(fresh) == bits(model)
        assert {name: t.data_ptr() for name, t in fresh.state_dict().items()} == places
        tensors, header = read_sparse(path)
        assert {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in tensors.items()} == bits(model)
        assert {row.name: row.kept for row in saved.tensors} == {n: r["kept"] for n, r in header["tensors"].items()}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 400), max_size=60), st.integers(0, 300), st.sampled_from([torch.float32, torch.uint8]))
def test_any_pattern_comes_back(tmp_path_factory: Any, gaps: list[int], end: int, dtype: torch.dtype) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    flat = torch.zeros(len(gaps) + sum(gaps) + end, dtype=dtype)
    flat[torch.tensor(gaps, dtype=torch.long).add(1).cumsum(0) - 1] = 3
    save_sparse(Holder(t=flat), path)
    assert torch.equal(read_sparse(path)[0]["t"], flat)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.floats(0, 1, allow_subnormal=False), st.integers(0, 10**6))
def test_a_pattern_is_found_again_and_close_to_its_entropy(n: int, density: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random(n) < density
    code, pattern = patterns.encode(mask)
    kept = int(mask.sum())
    where = patterns.decode(pattern, code, kept, n)
    again = np.zeros(n, bool)
    again[where] = True
    assert np.array_equal(again, mask)
    if kept:
        assert 8 * len(pattern) <= min(n + 7, kept * (math.log2(n / kept) + 2) + 8 * (math.log2(n / kept) + 3))


def test_values_that_are_no_numbers_and_negative_zero(path: Path) -> None:
    weight = torch.zeros(50, 50)
    weight[3, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1.0])
    weight.view(torch.int32)[7, 7] = 0x7FC0BEEF  # a NaN that carries something
    model = Holder(weight=weight)
    save_sparse(model, path)
    assert read_sparse(path)[1]["tensors"]["weight"]["kept"] == 6  # all but the −0.0
    assert bits(load_sparse(Holder(weight=torch.ones(50, 50)), path)) == bits(model)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e5m2], ids=str)
def test_a_mask_that_was_multiplied_leaves_negative_zeros(dtype: torch.dtype, path: Path) -> None:
    model = mlp(200, 300)
    model[0].weight.data *= torch.rand_like(model[0].weight) < 0.05
    model = model.to(dtype)
    saved = save_sparse(model, path)
    assert saved.tensors[0].kept == saved.kept == int(model[0].weight.float().count_nonzero())
    each = saved.tensors[0].dense_bytes // 60_000
    assert saved.bytes < 3000 * (each + 0.8) * 1.1 + 60_000 / 8 + 300 * each + 1000  # a bit for each sign
    assert bits(load_sparse(mlp(200, 300).to(dtype), path)) == bits(model)
    tensors, header = read_sparse(path)
    assert raw(tensors["0.weight"]) == raw(model[0].weight)
    assert header["tensors"]["0.weight"]["kept"] == saved.kept
    outer, inner, payload = parts(path.read_bytes())
    entry = inner["sparse"]["0.weight"]
    for change in (
        [0, 60_000],
        [1, 0, 0],
        [-1, 10, 3],
        [-1, entry[4], entry[5] - 1],
        [-1, entry[4], 58_000],
        ["", 0, 1],
        [[[]], entry[4], entry[5]],
    ):
        inner["sparse"]["0.weight"] = [*entry[:3], *change]
        path.write_bytes(signed(outer, inner, payload))
        check_refused(mlp(200, 300), path, "damaged: ")


def test_memory_in_any_order(path: Path) -> None:
    base = draw((6, 8, 5, 7), torch.float32, 0.2)
    model = Holder(
        last=base.contiguous(memory_format=torch.channels_last), turned=base[0, 0].t(), part=base[1, :, ::2, 1:],
        conj=draw((6, 7), torch.complex64, 0.2).conj(), view=base.flatten()[3:90],
    )  # fmt: skip
    save_sparse(model, path)
    fresh = copy.deepcopy(model)
    for tensor in fresh.state_dict().values():
        tensor.fill_(1)
    strides = [t.stride() for t in fresh.state_dict().values()]
    assert bits(load_sparse(fresh, path)) == bits(model)
    assert [t.stride() for t in fresh.state_dict().values()] == strides


def test_dead_rows_take_next_to_nothing(path: Path) -> None:
    weight = torch.zeros(2000, 784)
    weight[700:740] = 1.0
    saved = save_sparse(Holder(weight=weight), path)
    assert saved.bytes < 1.25 * 40 * 784 * 4
    assert save_sparse(Holder(weight=torch.zeros(2000, 784)), path).bytes < 500


def test_the_smallest_of_three_is_taken(path: Path) -> None:
    model = Holder(**{f"d{d}": draw((100, 100), torch.float32, d / 100, d) for d in (0, 5, 30, 60, 90, 100)})
    ways = {row.name: row.encoding for row in save_sparse(model, path).tensors}
    assert ways == {"d0": "gaps", "d5": "gaps", "d30": "gaps", "d60": "bitmask", "d90": "bitmask", "d100": "dense"}


def test_the_same_network_makes_the_same_file(path: Path) -> None:
    save_sparse(sparse_net(), path)
    content = path.read_bytes()
    save_sparse(sparse_net(), path)
    assert path.read_bytes() == content


# ---------------------------------------------------------------------- size


@pytest.mark.parametrize("widths", [(784, 200, 80, 10), (784, 1200, 900, 10)])
@pytest.mark.parametrize("init", [True, False])
def test_close_to_the_bound_and_far_below_the_dense_file(widths: tuple[int, ...], init: bool, path: Path) -> None:
    torch.manual_seed(0)
    model = mlp(*widths)
    if init:
        tb.sparse_init_(model, 0.05)
    else:
        for layer in model:
            layer.weight.data[torch.rand_like(layer.weight) >= 0.05] = 0
    bound = 0.0
    for layer in model:
        n, kept = layer.weight.numel(), int(layer.weight.count_nonzero())
        p = kept / n
        entropy = -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
        bound += 4 * kept + entropy + 4 * layer.bias.numel()
    saved = save_sparse(model, path)
    assert saved.bytes <= 1.05 * bound  # 1.25 is what is promised
    assert saved.share <= 0.08


def test_what_saving_returns(path: Path) -> None:
    net = sparse_net(0.25)
    saved = save_sparse(net, path)
    assert isinstance(saved, Saved)
    assert saved.path == path
    assert saved.bytes == path.stat().st_size
    assert saved.dense_bytes == len(safetensors.torch.save(net.state_dict()))
    assert saved.density == tb.density(net) == read_sparse(path)[1]["density"]
    assert (saved.kept, saved.size) == tb.sparsity_report(net).weights
    for text in (f"{saved.bytes:,}", f"{saved.dense_bytes:,}", f"{saved.kept:,} of {saved.size:,} weights", "%"):
        assert text in str(saved)
        assert text in repr(saved)
    assert {line.split()[0] for line in saved.table().splitlines()[1:]} == net.state_dict().keys()
    with pytest.raises(AttributeError):
        saved.bytes = 3
    assert math.isnan(save_sparse(nn.BatchNorm1d(3), path).density)


# ---------------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_reaches_floating_point_parameters_only(dtype: torch.dtype, path: Path) -> None:
    net = sparse_net(0.5).double()
    saved = save_sparse(net, path, dtype=dtype)
    tensors, _ = read_sparse(path)
    fresh = load_sparse(Net(), path)  # float32 stays
    for name, tensor in net.state_dict().items():
        rounded = name in dict(net.named_parameters())
        assert tensors[name].dtype == (dtype if rounded else tensor.dtype)
        assert torch.equal(tensors[name], tensor.to(dtype) if rounded else tensor)
        assert fresh.state_dict()[name].dtype == (torch.int64 if "tracked" in name else torch.float32)
        assert torch.equal(fresh.state_dict()[name], tensors[name].to(fresh.state_dict()[name].dtype))
    assert saved.dense_bytes == len(safetensors.torch.save(net.state_dict()))
    half = copy.deepcopy(net).to(torch.float16)
    save_sparse(half, path, dtype=torch.bfloat16)  # has sixteen bits already
    assert read_sparse(path)[0]["fc.weight"].dtype == torch.float16


def test_values_too_large_to_round(path: Path) -> None:
    net = sparse_net()
    net.fc.weight.data[1, 2] = 7e4
    with pytest.raises(ValueError, match=r"fc\.weight holds 70000, which is infinite in torch\.float16"):
        save_sparse(net, path, dtype=torch.float16)
    assert not path.exists()
    save_sparse(net, path)
    before = bits(half := Net().half())
    with pytest.raises(ValueError, match=r"does not fit the model: fc\.weight holds 70000"):
        load_sparse(half, path)
    assert bits(half) == before
    net.fc.weight.data[1, 2] = float("inf")
    save_sparse(net, path, dtype=torch.float16)
    assert load_sparse(Net(), path).fc.weight[1, 2] == float("inf")


def test_what_becomes_zero_is_not_kept(path: Path) -> None:
    layer = nn.Linear(50, 50, bias=False)
    layer.weight.data.fill_(1e-12)[0, 0] = 1
    saved = save_sparse(layer, path, dtype=torch.float16)
    assert saved.kept == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "bfloat16", torch.float8_e5m2])
def test_other_dtypes_are_refused(dtype: Any, path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Invalid `dtype`: {dtype!r}; expected torch.bfloat16")):
        save_sparse(Net(), path, dtype=dtype)


# ---------------------------------------------------------------------- in place, tied, wrapped


class Tied(nn.Module):
    def __init__(self, width: int = 30, tied: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(40, width)
        self.body = nn.Linear(width, width)
        self.again = self.body if tied else nn.Linear(width, width)
        self.head = nn.Linear(width, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight


def test_loading_keeps_storage_gradients_and_modes(path: Path) -> None:
    net, fresh = sparse_net(), Net().eval()
    save_sparse(net, path)
    fresh.fc.weight.requires_grad_(False)
    fresh.out.weight.grad = torch.ones_like(fresh.out.weight)
    objects = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in fresh.named_parameters()}
    load_sparse(fresh, path)
    assert bits(fresh) == bits(net)
    assert {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in fresh.named_parameters()} == objects
    assert not fresh.training
    assert torch.equal(fresh.out.weight.grad, torch.ones_like(fresh.out.weight))
    state = torch.get_rng_state()
    load_sparse(fresh, path)
    assert torch.equal(torch.get_rng_state(), state)


def test_tied_weights_are_stored_once_and_stay_tied(path: Path) -> None:
    model = Tied()
    saved = save_sparse(model, path)
    assert [row.name for row in saved.tensors] == ["table.weight", "body.weight", "body.bias"]
    assert saved.size == 30 * 30  # the table is an embedding, too
    fresh = load_sparse(Tied(), path)
    assert fresh.head.weight is fresh.table.weight
    assert bits(fresh) == bits(model)
    assert bits(load_sparse(Tied(tied=False), path)) == bits(model)
    tensors, header = read_sparse(path)
    assert tensors["head.weight"] is tensors["table.weight"]
    assert header["same"] == {"again.weight": "body.weight", "again.bias": "body.bias", "head.weight": "table.weight"}


def test_two_contents_for_one_tensor(path: Path) -> None:
    apart = Tied(tied=False)
    save_sparse(apart, path)
    fresh = Tied()
    before = bits(fresh)
    with pytest.raises(ValueError, match="are one tensor in the model and two in the file"):
        load_sparse(fresh, path)
    assert bits(fresh) == before
    apart.head.weight.data.copy_(apart.table.weight)
    apart.again.load_state_dict(apart.body.state_dict())
    save_sparse(apart, path)
    assert bits(load_sparse(fresh, path)) == bits(apart)


def test_compiled_networks_have_the_names_of_the_others(path: Path) -> None:
    net, fresh = sparse_net(), Net()
    save_sparse(torch.compile(net, backend="eager"), path)
    assert bits(load_sparse(fresh, path)) == bits(net)
    partly = Net()
    partly.fc = torch.compile(partly.fc, backend="eager")
    load_sparse(partly, path)
    assert torch.equal(partly.fc._orig_mod.weight, net.fc.weight)
    save_sparse(partly, path)
    assert bits(load_sparse(Net(), path)) == bits(net)


def test_buffers_that_are_not_persistent_stay_out(path: Path) -> None:
    net = Holder(a=torch.ones(3))
    net.register_buffer("scratch", torch.ones(2), persistent=False)
    save_sparse(net, path)
    assert list(read_sparse(path)[0]) == ["a"]


def test_models_that_no_file_can_hold(path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

    with pytest.raises(ValueError, match=r"Invalid `model`: 0 \(Extra\) has an extra state"):
        save_sparse(nn.Sequential(Extra(2, 2)), path)
    with pytest.raises(ValueError, match="weight is on the meta device"):
        save_sparse(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(ValueError, match="sparse_coo"):
        save_sparse(Holder(a=torch.ones(3, dtype=torch.int32).to_sparse()), path)
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="not initialised yet"):
        save_sparse(lazy, path)
    with pytest.raises(ValueError, match="0 is a ScriptModule, which"):
        save_sparse(nn.Sequential(torch.jit.ScriptModule()), path)
    assert not path.exists()


class Packed(nn.Linear):
    """As a quantized layer: its weight is no parameter, and only its state_dict shows it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.packed = (self._parameters.pop("weight"), 8)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed"] = self.packed


def with_hook(what: Any) -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({f"{prefix}more": what}))
    return layer


class Overridden(nn.Linear):
    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        return {**super().state_dict(*args, **options), "config": {"width": 3}}


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (nn.Sequential(nn.ReLU(), Packed(3, 2)), r"'1.packed', of 1 \(Packed\)"),
        (nn.Sequential(with_hook(torch.ones(2))), r"'0.more', of 0 \(Linear\)"),
        (nn.Sequential(with_hook("a word")), r"'0.more', of 0 \(Linear\)"),
        (Overridden(3, 2), r"'config', of the model \(Overridden\)"),
    ],
)
def test_what_a_state_dict_holds_beside_parameters_and_buffers_is_refused(
    model: nn.Module, named: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=f"Invalid `model`: its state_dict has {named}, which is neither"):
        save_sparse(model, path)
    assert not path.exists()
    save_sparse(nn.Linear(3, 2), path)
    with pytest.raises(ValueError, match=f"Invalid `model`: its state_dict has {named}, which is neither"):
        load_sparse(model, path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch, which drops them
def test_a_quantized_network_is_refused(path: Path) -> None:
    quantized = torch.ao.quantization.quantize_dynamic(mlp(6, 5, 2), {nn.Linear})
    save_sparse(mlp(6, 5, 2), path)
    for refused in (save_sparse, load_sparse):
        with pytest.raises(ValueError, match=r"its state_dict has '0\..*, of 0.* sparse file would lack it"):
            refused(quantized, path)


def test_another_name_of_a_tensor_in_the_state_dict_is_nothing_more(path: Path) -> None:
    model = nn.Linear(3, 2)
    model.register_state_dict_post_hook(lambda module, state, prefix, meta: state.update(alias=module.weight))
    save_sparse(model, path)
    assert sorted(read_sparse(path)[0]) == ["bias", "weight"]


@pytest.mark.parametrize("way", ["pruned", "weight_norm", "spectral_norm"])
def test_reparametrised_layers_come_back_exactly_and_the_result_says_so(way: str, path: Path) -> None:
    def network() -> nn.Module:
        net = mlp(6, 5, 2)
        if way == "pruned":
            prune.l1_unstructured(net[0], "weight", 0.5)
        else:
            getattr(parametrizations, way)(net[0])
        return net.eval()

    model, fresh, x = network(), network(), torch.randn(3, 6)
    assert "0.weight is computed from other tensors in every call" in str(save_sparse(model, path))
    load_sparse(fresh, path)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_sparse(mlp(6, 5, 2), path)


# ---------------------------------------------------------------------- what does not fit


def check_refused(model: nn.Module, path: Path, match: str) -> None:
    before, modules = bits(model), list(map(id, model.modules()))
    with pytest.raises(ValueError, match=match) as caught:
        load_sparse(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bits(model) == before
    assert list(map(id, model.modules())) == modules


def test_other_networks_are_refused_and_left_alone(path: Path) -> None:
    save_sparse(sparse_net(hidden=25), path)
    check_refused(
        Net(), path, r"'fc\.weight' is \(25, 6\) in the file and \(20, 6\) in the model.*only replaced by a sm"
    )
    check_refused(mlp(3, 4), path, r"it lacks '0\.bias', '0\.weight'; the model lacks 'conv\.weight'.* and \d+ more")
    save_sparse(Holder(a=torch.ones(3), b=torch.ones(2)), path)
    check_refused(Holder(a=torch.ones(3), c=torch.ones(2)), path, "it lacks 'c'; the model lacks 'b'")
    check_refused(Holder(a=torch.ones(4), b=torch.ones(2)), path, r"'a' is \(3,\) in the file and \(4,\)")
    check_refused(Holder(a=torch.ones(3).int(), b=torch.ones(2)), path, r"'a' is torch\.float32 .* torch\.int32")
    with torch.inference_mode():
        made = torch.ones(3)
    check_refused(Holder(a=made, b=torch.ones(2)), path, "inference mode")
    save_sparse(Holder(a=torch.ones(3, dtype=torch.int32)), path)
    check_refused(Holder(a=torch.zeros((), dtype=torch.int32).expand(3)), path, "expanded")
    save_sparse(Holder(a=torch.ones(3, 2)), path)
    check_refused(Holder(a=torch.ones(3, dtype=torch.complex64)), path, r"\(3, 2\) in the file")


# ---------------------------------------------------------------------- smaller layers


def shrunk() -> Net:
    """What a shrunk network looks like: fewer channels and neurons, a bias folded in, a norm gone, a low rank."""
    torch.manual_seed(1)
    net = Net(4, 11)
    net.conv = nn.Conv2d(2, 4, 3, padding=1)
    net.norm = nn.Identity()
    net.fc = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 11))
    return net


def test_a_shrunk_network_loads_into_a_fresh_one_of_its_class(path: Path) -> None:
    small, x = shrunk().eval(), torch.randn(5, 2, 8, 8)
    save_sparse(small, path)
    fresh = Net().eval()
    fresh.out.weight.requires_grad_(False)
    state = torch.get_rng_state()
    load_sparse(fresh, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert bits(fresh) == bits(small)
    assert torch.equal(fresh(x), small(x))
    assert [type(m) for m in fresh.modules()] == [type(m) for m in small.modules()]
    assert not any(m.training for m in fresh.modules())
    assert [n for n, p in fresh.named_parameters() if not p.requires_grad] == ["out.weight"]
    assert fresh.conv.padding == (1, 1)
    in_half = load_sparse(Net().bfloat16(), path)
    assert {p.dtype for p in in_half.parameters()} == {torch.bfloat16}
    assert torch.equal(in_half.fc[0].weight, small.fc[0].weight.bfloat16())
    # And not the other way round.
    save_sparse(Net(), path)
    check_refused(small, path, "larger in the file")


def test_numbers_of_a_norm_are_those_of_the_model(path: Path) -> None:
    save_sparse(nn.ModuleList([nn.BatchNorm1d(3)]), path)
    fresh = load_sparse(nn.ModuleList([nn.BatchNorm1d(5, eps=0.1, momentum=None)]), path)
    assert (fresh[0].num_features, fresh[0].eps, fresh[0].momentum) == (3, 0.1, None)


def test_tied_layers_stay_tied_when_they_are_replaced(path: Path) -> None:
    small = Tied(12)
    save_sparse(small, path)
    fresh = load_sparse(Tied(), path)
    assert bits(fresh) == bits(small)
    assert fresh.head.weight is fresh.table.weight
    assert fresh.again is fresh.body


def test_in_a_compiled_part(path: Path) -> None:
    save_sparse(nn.ModuleDict({"a": nn.Linear(3, 2)}), path)
    fresh = nn.ModuleDict({"a": torch.compile(nn.Linear(3, 4), backend="eager")})
    load_sparse(fresh, path)
    assert fresh["a"](torch.ones(1, 3)).shape == (1, 2)


EVERY_KIND = [
    nn.Linear(3, 4), nn.Linear(3, 4, bias=False), nn.Conv1d(2, 4, 3, stride=2, groups=2),
    nn.Conv2d(2, 4, (3, 5), padding="same", dilation=2), nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="circular"),
    nn.Conv3d(1, 2, 2, bias=False), nn.ConvTranspose1d(2, 3, 3),
    nn.ConvTranspose2d(2, 4, 3, stride=2, output_padding=1),
    nn.ConvTranspose3d(2, 2, (1, 2, 3)), nn.BatchNorm1d(4), nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm3d(4, track_running_stats=False), nn.InstanceNorm1d(3), nn.InstanceNorm2d(3, affine=True),
    nn.InstanceNorm3d(3, track_running_stats=True), nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False),
    nn.LayerNorm((3, 3)), nn.LayerNorm(4, bias=False), nn.LayerNorm(4, elementwise_affine=False),
    Attention(4, 2, 3), Attention(4, 1, 2, key_width=5, value_width=3, bias=False, batch_first=True),
    nn.Embedding(5, 2, padding_idx=-1), nn.Embedding(5, 2, sparse=True), nn.Identity(), nn.Sequential(),
    nn.Sequential(nn.Linear(3, 1), nn.Sequential(nn.Identity(), nn.BatchNorm1d(1))),
]  # fmt: skip


BUILT = {cls.__name__ for cls, kind in REGISTRY.items() if kind.arguments is not None}


@pytest.mark.parametrize("module", EVERY_KIND, ids=str)
def test_every_kind_is_described_and_built(module: nn.Module, path: Path) -> None:
    save_sparse(nn.ModuleDict({"a": module}), path)
    large = nn.Bilinear(9, 9, 9)
    fresh = load_sparse(nn.ModuleDict({"a": large}), path)["a"]
    assert repr(fresh) == repr(module)
    assert bits(fresh) == bits(module)
    assert describe(fresh) == describe(module)
    assert {type(m).__name__ for m in EVERY_KIND} == {*BUILT, "Sequential"}


def test_modules_of_unknown_types_are_known_by_their_tensors_alone(path: Path) -> None:
    class Mine(nn.Linear):
        pass

    save_sparse(nn.ModuleDict({"a": nn.Linear(3, 2)}), path)
    fresh = load_sparse(nn.ModuleDict({"a": Mine(3, 2)}), path)
    assert type(fresh["a"]) is Mine
    save_sparse(nn.ModuleDict({"a": Mine(3, 2)}), path)
    assert read_sparse(path)[1]["modules"] == {}
    assert type(load_sparse(nn.ModuleDict({"a": nn.Linear(3, 2)}), path)["a"]) is nn.Linear


class Mixer(nn.Module):
    """Stands for a kind that another module of the library adds."""

    def __init__(self, width: int, inner: int, bias: bool = True) -> None:
        super().__init__()
        self.width, self.inner, self.bias = width, inner, bias
        self.q, self.k, self.v = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        self.o = nn.Linear(inner, width, bias=bias)


class MixerKind(Kind):
    arguments = ("width", "inner")
    options = {"bias": True}  # noqa: RUF012


def test_kinds_can_be_added(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, Mixer, MixerKind(Mixer))
    small = nn.ModuleDict({"a": Mixer(8, 4)})
    save_sparse(small, path)
    assert read_sparse(path)[1]["modules"] == {"a": ["Mixer", 8, 4]}
    fresh = load_sparse(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), path)
    assert type(fresh["a"]) is Mixer
    assert bits(fresh) == bits(small)
    monkeypatch.delitem(REGISTRY, Mixer)
    check_refused(nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), path, "'a' is of the unknown kind 'Mixer'")


# ---------------------------------------------------------------------- what shrink makes


class Reader(nn.Module):
    """With nn.MultiheadAttention, whose heads can go."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.block = nn.TransformerEncoderLayer(12, 4, 24, dropout=0.3, batch_first=True, bias=bias)
        self.out = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.block(self.table(tokens)).mean(1))


class ByHand(nn.Module):
    """Attention whose number of heads stands in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


def with_dead_units(model: nn.Module) -> nn.Module:
    """Filters, neurons and a head are zero, and a layer of the Net has a low rank."""
    with torch.no_grad():
        if isinstance(model, Net):
            model.conv.weight[2:4] = 0
            model.norm.bias.normal_()
            model.fc.weight.copy_(torch.randn(20, 1) @ torch.randn(1, 6))
            model.out.weight[:, 5:9] = 0
        elif isinstance(model, Reader):
            model.block.self_attn.in_proj_weight[24:27] = 0
            if model.block.self_attn.in_proj_bias is not None:
                model.block.self_attn.in_proj_bias.normal_()
            model.block.linear1.weight[::3] = 0
        else:
            model.value.weight[3:6] = 0
    return model.eval()


@pytest.mark.parametrize("build", [Net, Reader, lambda: Reader(bias=False)], ids=["net", "reader", "without bias"])
def test_what_shrink_leaves_loads_into_a_fresh_network_of_the_class(build: Callable[[], nn.Module], path: Path) -> None:
    torch.manual_seed(0)
    model = with_dead_units(build())
    x = torch.randn(3, 2, 6, 6) if isinstance(model, Net) else torch.randint(30, (3, 5))
    small = tb.shrink(model, (x,)).model
    saved = tb.save_sparse(small, path)
    fresh = tb.load_sparse(build().eval(), path)
    assert torch.equal(fresh(x), small(x))
    assert [type(m) for m in fresh.modules()] == [type(m) for m in small.modules()]
    assert bits(fresh) == bits(small)
    assert saved.size < sum(p.numel() for p in model.parameters())
    if isinstance(model, Net):
        assert isinstance(fresh.fc, nn.Sequential)  # two factors
    else:
        attention = fresh.block.self_attn
        assert isinstance(attention, Attention)
        assert (attention.heads, attention.head_width, attention.dropout, attention.batch_first) == (3, 3, 0.3, True)


def test_sizes_in_the_code_are_not_in_the_file(path: Path) -> None:
    torch.manual_seed(0)
    model, x = with_dead_units(ByHand()), torch.randn(2, 5, 12)
    small = tb.shrink(model, (x,)).model
    assert isinstance(small, torch.fx.GraphModule)
    save_sparse(small, path)
    check_refused(ByHand(), path, r"holds a torch\.fx\.GraphModule.* load it into the model that tb\.shrink returns")
    again = copy.deepcopy(small)
    for parameter in again.parameters():
        parameter.data.zero_()
    assert torch.equal(load_sparse(again, path)(x), small(x))
    model.value.weight.data[6:9] = 0
    save_sparse(tb.shrink(model, (x,)).model, path)
    check_refused(small, path, "is another in the file, and a GraphModule keeps its own")
    outer, inner, payload = parts(path.read_bytes())
    path.write_bytes(signed(outer, {**inner, "graph": 1}, payload))
    check_refused(small, path, "damaged")


# ---------------------------------------------------------------------- hostile files


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(outer header, inner description, payload)."""
    n = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + n])
    return outer, json.loads(outer["__metadata__"][METADATA]), content[8 + n :]


def signed(outer: dict[str, Any], inner: Any, payload: bytes) -> bytes:
    """A file with a checksum that fits: `inner` is a description, or its text with 64 zeros in it."""
    if not isinstance(inner, str):
        inner = json.dumps({**inner, "sha256": "0" * 64})
    outer["__metadata__"][METADATA] = inner
    header = json.dumps(outer).encode()
    content = len(header).to_bytes(8, "little") + header + payload
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


Edit = Callable[[dict[str, Any], dict[str, Any]], object]
W, B = "fc.weight", "conv.weight"


def at(table: str, key: str, index: int, value: Any) -> Edit:
    return lambda outer, inner: inner[table][key].__setitem__(index, value)


def put(table: str, key: str, value: Any) -> Edit:
    return lambda outer, inner: inner.setdefault(table, {}).__setitem__(key, value)


HOSTILE: dict[str, tuple[Edit, str]] = {
    "another origin": (lambda o, i: o["__metadata__"].clear(), "but no sparse file"),
    "newer": (lambda o, i: i.update(version=2), r"written by a newer version \(format 2\); update torch-bregman"),
    "version": (lambda o, i: i.update(version="1"), "damaged: its description cannot be read"),
    "version 0": (lambda o, i: i.update(version=0), "damaged"),
    "version true": (lambda o, i: i.update(version=True), "damaged"),
    "unknown key": (lambda o, i: i.update(run="rm"), "the unknown 'run'"),
    "kept": (lambda o, i: i.update(kept=10**9), "it keeps 1000000000 of"),
    "kept negative": (lambda o, i: i.update(kept=-1), "it keeps -1 of"),
    "sparse": (lambda o, i: i.update(sparse=[1]), "no table of names"),
    "complex": (lambda o, i: i.update(complex=[[1]]), "no list of names"),
    "complex real": (lambda o, i: i.update(complex=["out.weight"]), "does not hold pairs"),
    "complex twice": (lambda o, i: i.update(complex=["fc.bias", "fc.bias"]), "twice"),
    "shape larger": (at("sparse", W, 0, [2**62, 2]), "has values of"),
    "shape overflows": (at("sparse", W, 0, [2**40, 2**40, 0]), "has values of"),
    "shape negative": (at("sparse", W, 0, [-20, -6]), "the description of 'fc.weight' is"),
    "shape of floats": (at("sparse", W, 0, [20.0, 6]), "the description of 'fc.weight' is"),
    "shape of bools": (at("sparse", W, 0, [True, 120]), "the description of 'fc.weight' is"),
    "shape of many": (at("sparse", W, 0, [1] * 1000), "the description of 'fc.weight' is"),
    "shape smaller": (at("sparse", W, 0, [2, 6]), "has values of"),
    "shape other": (at("sparse", W, 0, [6, 20]), r"'fc\.weight' is \(6, 20\) in the file and \(20, 6\)"),
    "code": (at("sparse", W, 1, 63), "the description of"),
    "code -2": (at("sparse", W, 1, -2), "the description of"),
    "code large": (at("sparse", W, 1, 40), "gaps are not of its size"),
    "code off": (at("sparse", W, 1, 0), "damaged: 'fc.weight': "),
    "mask": (at("sparse", W, 1, -1), "bitmask is not of its size"),
    "length": (at("sparse", W, 2, 10**12), "ends beyond the patterns"),
    "length less": (at("sparse", W, 2, 1), "bytes of patterns too many"),
    "entry": (put("sparse", W, {}), "the description of 'fc.weight' is"),
    "sparse unknown": (put("sparse", "nothing", [[3], 0, 0]), "it describes 'nothing', which it does not hold"),
    "alias of nothing": (put("same", "x", "nothing"), "'x' is said to be the same as 'nothing'"),
    "alias of itself": (put("same", "x", "x"), "same as 'x'"),
    "alias cycle": (lambda o, i: i.update(same={"x": "y", "y": "x"}), "is said to be the same as"),
    "alias of a tensor": (put("same", W, B), "is said to be the same as"),
    "alias of a list": (put("same", "x", ["y"]), "is said to be the same as"),
    "alias unexpected": (put("same", "x", B), "the model lacks 'x'"),
    "module": (put("modules", "fc", "Linear"), "the module 'fc' is described as"),
    "module empty": (put("modules", "fc", []), "the module 'fc' is described as"),
    "module nested": (put("modules", "fc", ["Linear", [[6]], 20]), "the module 'fc' is described as"),
    "module float": (put("modules", "fc", ["Linear", 6.0, 20]), "the module 'fc' is described as"),
    "module deep": (put("modules", "fc" + ".0" * 100, ["Identity"]), "is described as"),
    "module kind": (put("modules", "fc", ["os.system", 1]), "of the unknown kind 'os.system'"),
    "module real name": (put("modules", "fc", ["torch.nn.Linear", 6, 20]), "unknown kind"),
    "module huge": (put("modules", "fc", ["Linear", 2**31, 2**31]), "larger in the file|no Linear can be built"),
    "module beyond": (put("modules", "fc", ["Linear", 2**80, 20]), "is described as"),
    "module negative": (put("modules", "fc", ["Linear", -6, 20]), "is described as"),
    "module argument": (put("modules", "fc", ["Linear", 6]), r"no Linear can be built for 'fc' from \[6\]"),
    "module option": (put("modules", "fc", ["Linear", 6, 20, {"device": "cuda"}]), "no Linear can be built"),
    "module dtype": (put("modules", "fc", ["Linear", 6, 20, {"bias": 1}]), "no Linear can be built"),
    "module groups": (put("modules", "conv", ["Conv2d", 2, 6, 3, {"groups": 0}]), "no Conv2d can be built"),
    "module tuple": (put("modules", "conv", ["Conv2d", 2, 6, [3, 3, 3]]), "no Conv2d can be built"),
    "module padding": (put("modules", "conv", ["Conv2d", 2, 6, 3, {"padding": "x"}]), "no Conv2d can be built"),
    "module larger": (put("modules", "fc", ["Linear", 60, 20]), "'fc' is larger in the file"),
    "module smaller": (put("modules", "fc", ["Linear", 6, 19]), r"'fc\.bias' is \(20,\) in the file and \(19,\)"),
    "sequential": (put("modules", "fc", ["Sequential", 2]), "'fc.0' is part of a Sequential but not described"),
    "sequential of many": (put("modules", "fc", ["Sequential", 2**31]), "is a Sequential of"),
    "sequential of none": (put("modules", "fc", ["Sequential", 0]), "the model lacks 'fc.bias'"),
    "sequential deep": (
        lambda o, i: i["modules"].update({"fc" + ".0" * k: ["Sequential", 1] for k in range(20)}), "nested too deep",
    ),
    "dtype": (lambda o, i: o["fc.bias"].update(dtype="F31"), "damaged"),
    "dtype other": (lambda o, i: o["fc.bias"].update(dtype="I32"), r"'fc\.bias' is torch\.int32 in the file"),
    "dense shape": (lambda o, i: o["fc.bias"].update(shape=[2**40, 2**40]), "damaged: safetensors cannot read it"),
    "overlap": (lambda o, i: o["fc.bias"].update(data_offsets=o["out.bias"]["data_offsets"]), "safetensors cannot"),
    "beyond": (lambda o, i: o["fc.bias"].update(data_offsets=[0, 2**62]), "safetensors cannot"),
    "patterns": (lambda o, i: o["..patterns"].update(shape=[1, *o["..patterns"]["shape"]]), "patterns are no bytes"),
    "no patterns": (lambda o, i: o.update(x=o.pop("..patterns")), "ends beyond the patterns"),
    "renamed": (lambda o, i: o.update(x=o.pop("fc.bias")), "it lacks 'fc.bias'; the model lacks 'x'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    net = sparse_net(0.15)
    save_sparse(net, path)
    content = path.read_bytes()
    again = signed(*parts(content))
    path.write_bytes(again)
    assert bits(load_sparse(Net(), path)) == bits(net)  # so a refusal is of what was edited
    assert {W, B} <= parts(content)[1]["sparse"].keys()
    return content


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_with_a_checksum_that_fits(name: str, content: bytes, path: Path) -> None:
    outer, inner, payload = parts(content)
    edit, match = HOSTILE[name]
    edit(outer, inner)
    if METADATA in outer["__metadata__"]:
        path.write_bytes(signed(outer, inner, payload))
    else:
        header = json.dumps(outer).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + payload)
    check_refused(Net(), path, match)
    tracemalloc.start()
    try:
        read_sparse(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017 - some of these are only wrong for the model
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_bombs_of_json(content: bytes, path: Path) -> None:
    outer, inner, payload = parts(content)
    text = json.dumps({**inner, "sha256": "0" * 64})
    for bomb in ("[" * 10**6, '{"a":' * 10**6, "[" * 900 + "]" * 900, "9" * 10**5, "1e999", "NaN"):
        for place in ("kept", "sparse", "same", "modules"):
            broken = json.dumps({**inner, "sha256": "0" * 64, place: "@"}).replace('"@"', bomb)
            path.write_bytes(signed(outer, broken, payload))
            check_refused(Net(), path, "damaged")
        header = b'{"__metadata__":' + bomb.encode() + b"}"
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        check_refused(Net(), path, "damaged|no sparse file")
    for table in ("same", "sparse", "modules"):
        inner.setdefault(table, {})["fc"] = json.loads("[" * 400 + "]" * 400)
        path.write_bytes(signed(outer, inner, payload))
        check_refused(Net(), path, "damaged")
        del inner[table]["fc"]
    twice = text.replace('"modules":', '"same": {"a": "fc.bias", "a": "fc.bias"}, "modules":')
    path.write_bytes(signed(outer, twice, payload))
    check_refused(Net(), path, "damaged: its description cannot be read")


def test_patterns_with_a_checksum_that_fits(content: bytes, path: Path) -> None:
    outer, inner, payload = parts(content)
    start, end = outer["..patterns"]["data_offsets"]
    assert inner["sparse"][W][1] > 0
    refused = 0
    for i in range(start, end):
        for bit in range(8):
            changed = bytearray(payload)
            changed[i] ^= 1 << bit
            path.write_bytes(signed(outer, inner, bytes(changed)))
            try:
                read_sparse(path)
            except ValueError as error:
                refused += "damaged: '" in str(error)
    assert refused > 2 * (end - start)  # every flipped bit of the unary part, and what leaves the tensor


@pytest.mark.parametrize(
    ("pattern", "code", "kept", "n", "match"),
    [
        ([0b111], -1, 3, 2, "bitmask"), ([0b11], -1, 3, 3, "keeps 2 entries"), ([3, 0], -1, 2, 2, "bitmask"),
        ([], -1, 1, 1, "bitmask"), ([1], 0, 0, 5, "no values"), ([], 3, 0, 5, "no values"),
        ([], 0, 1, 5, "gaps are not"), ([0b100, 0], 0, 1, 5, "not of its size"), ([0b10000000], 0, 1, 5, "beyond"),
        ([0b11], 0, 1, 5, "has 2 gaps"), ([0b1], 0, 2, 5, "has 1 gaps"), ([0b10, 0b1], 1, 1, 5, "beyond their end"),
        ([1, 1, 1, 2], 3, 1, 12, "beyond"), ([0b1, 0b1], 3, 1, 3, "not of its size"),
    ],
)  # fmt: skip
def test_patterns_that_are_none(pattern: list[int], code: int, kept: int, n: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        patterns.decode(np.array(pattern, np.uint8), code, kept, n)


def test_bools_that_are_neither(path: Path) -> None:
    save_sparse(Holder(a=torch.ones(4, dtype=torch.bool)), path)
    outer, inner, _ = parts(path.read_bytes())
    path.write_bytes(signed(outer, inner, b"\1\2\1\1"))
    check_refused(Holder(a=torch.ones(4, dtype=torch.bool)), path, "bools that are neither")


def test_files_that_are_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x"
    for junk in (b"", b"{", b"\0" * 8, b"\0" * 100, b"PK\3\4" + bytes(100), b"hello world, this is text", b"\xff" * 50):
        path.write_bytes(junk)
        check_refused(Net(), path, "is not a safetensors file")
    path.write_bytes((10**10).to_bytes(8, "little") + b"{" + bytes(100))
    check_refused(Net(), path, "is not a safetensors file")
    path.write_bytes((200).to_bytes(8, "little") + b"{" + bytes(100))
    check_refused(Net(), path, "is truncated: 109 bytes")
    with open(path, "wb") as file:
        file.write((10**7).to_bytes(8, "little") + b"{")
        file.truncate(10**7 + 8)
    check_refused(Net(), path, "header of 10,000,000 bytes")
    path.write_bytes(content[:-20])
    check_refused(Net(), path, "damaged or truncated: its checksum")
    path.write_bytes(content + b"x")
    check_refused(Net(), path, "checksum")
    torch.save(Net().state_dict(), path)
    check_refused(Net(), path, "is not a safetensors file")
    safetensors.torch.save_file(Net().state_dict(), path)
    check_refused(Net(), path, "is a safetensors file, but no sparse file")
    safetensors.torch.save_file(Net().state_dict(), path, {METADATA: "3"})
    check_refused(Net(), path, "description cannot be read")
    safetensors.torch.save_file(Net().state_dict(), path, {METADATA: '{"version": 1}'})
    check_refused(Net(), path, "it has no checksum")
    text = json.dumps({"version": 1, "sha256": "\ud800" * 64})
    safetensors.torch.save_file(Net().state_dict(), path, {METADATA: text})
    check_refused(Net(), path, "it has no checksum")
    with pytest.raises(FileNotFoundError):
        load_sparse(Net(), tmp_path / "nothing")
    check_refused(Net(), tmp_path, "is no file")
    os.mkfifo(tmp_path / "pipe")
    check_refused(Net(), tmp_path / "pipe", "is no file")


def test_a_small_file_cannot_fill_the_memory(path: Path) -> None:
    save_sparse(Holder(a=torch.zeros(1000, 1000)), path)
    outer, inner, payload = parts(path.read_bytes())
    inner["sparse"]["a"][0] = [1 << 20, 1 << 18]
    path.write_bytes(signed(outer, inner, payload))
    assert path.stat().st_size < 1000
    with pytest.raises(ValueError, match=r"has tensors of 1,099,511,627,776 bytes, more than 6\d,\d\d\d,\d\d\d;"):
        read_sparse(path)
    check_refused(Holder(a=torch.zeros(1000, 1000)), path, r"\(1048576, 262144\) in the file")
    save_sparse(Holder(a=torch.zeros(1000, 1000)), path)
    assert read_sparse(path, limit=4_000_000)[0]["a"].shape == (1000, 1000)
    with pytest.raises(ValueError, match="has tensors of 4,000,000 bytes, more than 3,999,999"):
        read_sparse(path, limit=3_999_999)
    with pytest.raises(ValueError, match="Invalid `limit`: -1"):
        read_sparse(path, limit=-1)
    with open(path, "wb") as file:  # a hole on the disk
        file.truncate(10**13)
    check_refused(Net(), path, "more than the .* that were expected")


# ---------------------------------------------------------------------- whole or not there


def test_a_failing_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sparse(sparse_net(), path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_sparse(sparse_net(seed=1), path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
    with pytest.raises(FileNotFoundError):
        save_sparse(sparse_net(), path.parent / "no" / "net.safetensors")
    save_sparse(sparse_net(seed=1), path)
    assert path.read_bytes() != before


# ---------------------------------------------------------------------- fuzz


def every_bit(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice([1, 8, 100]))


def splice(content: bytes, rng: random.Random) -> bytes:
    a, b, c = (rng.randrange(len(content)) for _ in range(3))
    return content[:a] + content[b : b + rng.randrange(200)] + content[c:]


def header_bytes(content: bytes, rng: random.Random) -> bytes:
    n = int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for _ in range(rng.choice([1, 2, 4])):
        changed[rng.randrange(8 + n)] = rng.choice(b'0123456789[]{}",:-. aeE\\')
    return bytes(changed)


VALUES = [0, 1, -1, 2, 3, 7, 8, 40, 2**31, 2**63, 2**64, 10**30, 1.5, True, None, "", "Linear", "fc.weight", "fc",
          "x" * 300, [], [1], [[]], {}, {"bias": False}, [20, 6], [2**32, 2**32],
          ["Linear", 6, 20], ["Sequential", 1]]  # fmt: skip


def mutate(value: Any, rng: random.Random) -> Any:
    """Change one place in a tree of JSON."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return value + rng.choice([-1, 1]) if type(value) is int and rng.random() < 0.5 else rng.choice(VALUES)
    if isinstance(value, list):
        value = list(value)
        if rng.random() < 0.2:
            rng.choice([value.pop, value.reverse, lambda: value.append(rng.choice(VALUES))])()
        else:
            i = rng.randrange(len(value))
            value[i] = mutate(value[i], rng)
        return value
    value, key = dict(value), rng.choice(list(value))
    if rng.random() < 0.2:
        value[rng.choice([*value, "fc", "x", "fc.0", "__metadata__"])] = value.pop(key)
    else:
        value[key] = mutate(value[key], rng)
    return value


def resigned(content: bytes, rng: random.Random) -> bytes:
    """Edits that keep the JSON and the checksum right."""
    outer, inner, payload = parts(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        kind = rng.random()
        if kind < 0.6:
            inner = mutate(inner, rng) if rng.random() < 0.05 else {k: (mutate(v, rng) if rng.random() < 0.3 else v)
                                                                    for k, v in inner.items()}  # fmt: skip
            inner = inner if isinstance(inner, dict) else {"version": 1}
        elif kind < 0.8:
            names = [name for name in outer if name != "__metadata__"]
            name = rng.choice(names)
            outer[name] = mutate(outer[name], rng)
        else:
            payload = every_bit(payload, rng) if rng.random() < 0.8 else splice(payload, rng)
    return signed(outer, inner, payload)


FUZZ = [every_bit, cut, longer, splice, header_bytes, resigned, resigned, resigned, resigned]


def fuzz(content: bytes, path: Path, count: int, seed: int) -> dict[str, int]:
    rng = random.Random(seed)
    good = bits(load_sparse(Rich(), path))
    shapes = {name: (dtype, shape) for name, (dtype, shape, _) in good.items()}
    found = {"same": 0, "other values": 0, "refused": 0, "read": 0}
    fresh = Rich()
    slowest, longest = 0.0, 0
    for _ in range(count):
        way = rng.choice(FUZZ)
        path.write_bytes(way(content, rng))
        blank = bits(fresh)
        start = time.perf_counter()
        try:
            load_sparse(fresh, path)
        except ValueError as error:
            found["refused"] += 1
            assert bits(fresh) == blank
            longest = max(longest, len(str(error)))
        else:
            after = bits(fresh)
            if way is resigned:  # a smaller network may be a valid one
                assert all(t.dtype == shapes[n][0] for n, t in fresh.state_dict().items() if n in shapes)
            else:
                assert after == good
            found["same" if after == good else "other values"] += 1
            fresh = Rich()
        try:
            read_sparse(path)
        except ValueError:
            pass
        else:
            found["read"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    assert slowest < 2
    assert longest < 1500
    return found


def check_fuzz(path: Path, count: int, seed: int) -> None:
    save_sparse(Rich.drawn(), path)
    content = path.read_bytes()
    _, inner, _ = parts(content)
    assert inner["same"]
    assert inner["complex"]
    assert {len(entry) for entry in inner["sparse"].values()} == {3, 6}
    tracemalloc.start()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = fuzz(content, path, count, seed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    print(found, peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident)
    assert peak < 30e6, peak
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident < 200_000  # kB; torch's are not traced
    assert found["refused"] > 0.7 * count, found
    assert found["same"] > 0.001 * count, found
    assert found["other values"] > 0.01 * count, found  # the deeper checks were reached


def test_a_thousand_damaged_files(path: Path) -> None:
    check_fuzz(path, 1000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_ten_thousand_damaged_files(path: Path, seed: int) -> None:
    check_fuzz(path, 10_000, seed)
