"""`optimize_for_inference`: the same outputs, whatever was chosen, and a report that says what and why."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import pairwise
from torch import Tensor, nn
from torch.nn import functional as F

from torch_bregman import kernels, sparse_init_
from torch_bregman.inference import InferenceModule, choice, optimize_for_inference
from torch_bregman.inference.attention import SplitAttention, split
from torch_bregman.inference.chain import WAYS, Chain
from torch_bregman.inference.links import Unfit
from torch_bregman.models import convnet, mlp, resnet18
from torch_bregman.network import WeightedSum
from torch_bregman.network.kinds import REGISTRY

needs_numba = pytest.mark.skipif(not kernels.available(), reason="needs numba")
IMAGE = (1, 28, 28)
ACTIVATIONS = [
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.3, 0.2), nn.LeakyReLU(0.1), nn.Sigmoid(), nn.Tanh(), nn.SiLU(), nn.GELU(),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings as short as they come: what is tested here is right whichever wins."""
    torch.manual_seed(0)
    monkeypatch.setattr(choice, "SECONDS", 0.0)


def sparse(net: nn.Module, density: float, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data.mul_(torch.rand(module.weight.shape, generator=generator) < density)
    return net.eval().requires_grad_(False)


def agree(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale + 1e-30)


def favour(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    """Let every measurement be won by the job of this name; "sparse" is whatever begins like that."""

    def race(jobs: dict[str, Any], seconds: float = 0.0, of: Any = min) -> dict[str, float]:
        return {n: 1e-6 if n == winner or (n.startswith("sparse") and winner == "sparse") else 1e-3 for n in jobs}

    monkeypatch.setattr(choice, "seconds_of", race)


def chains(module: nn.Module) -> list[Chain]:
    return [m for m in module.modules() if isinstance(m, Chain)]


# ---- Chains


@needs_numba
@pairwise({"way": WAYS, "density": [0.0, 0.02, 0.3, 1.0], "batch": [0, 1, 3, 16, 37, 130]})
def test_a_chain_of_linear_layers(way: str, density: float, batch: int) -> None:
    net = sparse(nn.Sequential(nn.Flatten(), nn.Linear(50, 67), nn.ReLU(), nn.Linear(67, 33, bias=False), nn.ReLU(),
                               nn.Linear(33, 20)), density)  # fmt: skip
    x = torch.randn(batch, 5, 10)
    x[:, :2] = 0
    chain = Chain(list(net), (5, 10), way)
    agree(chain(x), net(x))
    agree(chain(x), net(x))  # the scratch memory of the first call is used again


@needs_numba
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: type(a).__name__)
def test_activations_are_fused(way: str, activation: nn.Module) -> None:
    net = sparse(nn.Sequential(nn.Linear(30, 40), activation, nn.Linear(40, 19), activation), 0.3)
    x = torch.cat([torch.randn(20, 30), 30 * torch.randn(20, 30), torch.zeros(1, 30)])
    for part in (list(net)[:2], list(net)):  # the activation itself, and its zeros as the input of a layer
        agree(Chain(part, (30,), way)(x), nn.Sequential(*part)(x))


@needs_numba
@pairwise(
    {
        "way": WAYS[1:],
        "pool": [None, (2,), (3, 2, 1), ((2, 1),), ((2, 2), 1), (1, 2)],
        "conv": [
            (6, 8, 3), (6, 8, 3, 1, 1), (6, 8, 3, 2, 1), (6, 9, (1, 3), 1, (0, 2), 1, 3), (6, 6, 3, 1, 2, 2, 6),
            (6, 8, 3, 1, "same"), (6, 8, 1), (6, 8, 3, (2, 1), (1, 2)),
        ],
    }
)  # fmt: skip
def test_a_chain_of_convolutions(way: str, pool: Any, conv: Any) -> None:
    after = [] if pool is None else [nn.MaxPool2d(*pool)]
    first = nn.Conv2d(*conv)
    net = nn.Sequential(first, nn.ReLU(), *after, nn.Conv2d(first.out_channels, 5, 3, padding=1), nn.Tanh())
    net = sparse(net, 0.3)
    net[0].weight[1] = 0  # a filter that does nothing
    x = torch.randn(19, 6, 11, 10)
    agree(Chain(list(net), (6, 11, 10), way)(x), net(x))


@needs_numba
@pytest.mark.parametrize("way", WAYS[1:])
def test_convolution_pooling_flatten_linear(way: str) -> None:
    net = sparse(convnet(IMAGE, 10), 0.05)
    for batch in (1, 17, 64):
        x = torch.randn(batch, *IMAGE)
        agree(Chain(list(net), IMAGE, way)(x), net(x))


@needs_numba
@pytest.mark.parametrize("way", WAYS)
def test_layouts_dtypes_and_gradients_that_a_chain_was_not_built_for(way: str) -> None:
    net = sparse(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)), 0.2)
    chain = Chain(list(net), (40,), way)
    x = torch.randn(80, 40)
    agree(chain(x[::2]), net(x[::2]))
    agree(chain(x.t().contiguous().t()), net(x))
    agree(chain(x[:1].expand(7, 40)), net(x[:1].expand(7, 40)))
    asks = x.clone().requires_grad_()
    chain(asks).sum().backward()
    agree(asks.grad, torch.autograd.functional.jacobian(lambda x: net(x).sum(), x))
    agree(chain(x[None]), net(x[None]))  # another shape
    agree(copy.deepcopy(chain).double()(x.double()), copy.deepcopy(net).double()(x.double()))


@needs_numba
@pairwise({"way": WAYS, "leading": [(), (3,), (2, 5), (4, 0), (0, 7), (2, 3, 40), (1, 1, 1, 1)], "kind": [0, 1, 2]})
def test_rows_in_any_number_of_dimensions(way: str, leading: tuple[int, ...], kind: int) -> None:
    net = sparse(nn.Sequential(nn.Linear(40, 30), nn.GELU(), nn.Dropout(0.1), nn.Linear(30, 8)), 0.2)
    chain = Chain(list(net), (40,), way)
    x = torch.randn(*leading, 40)
    if kind == 1:  # lies in another order than it is read
        x = x.mT.contiguous().mT if x.dim() > 1 else torch.randn(80)[::2]
    elif kind == 2:
        x = torch.randn(40).expand(*leading, 40)
    agree(chain(x), net(x))
    for other in (torch.randn(3, 40), torch.randn(5, 6, 40), torch.randn(40)):
        agree(chain(other), net(other))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        chain(torch.randn(2, 3, 41))


@needs_numba
@pytest.mark.parametrize("way", WAYS)
def test_a_chain_that_flattens_is_not_for_rows(way: str) -> None:
    net = sparse(nn.Sequential(nn.Linear(40, 30), nn.Flatten(), nn.ReLU(), nn.Linear(30, 8)), 0.2)
    chain = Chain(list(net), (40,), way)
    agree(chain(torch.ones(3, 40)), net(torch.ones(3, 40)))
    agree(chain(torch.ones(3, 1, 40)), net(torch.ones(3, 1, 40)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        chain(torch.ones(3, 2, 40))


@needs_numba
@pytest.mark.parametrize("way", WAYS)
def test_another_default_dtype(way: str) -> None:
    net = sparse(nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)), 0.2)
    x = torch.randn(20, 40)
    try:
        torch.set_default_dtype(torch.float64)
        agree(Chain(list(net), (40,), way)(x), net(x))
    finally:
        torch.set_default_dtype(torch.float32)


@needs_numba
def test_an_image_of_another_size() -> None:
    net = sparse(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), 0.3)
    chain = Chain(list(net), (3, 8, 8), "panels of 1")
    for size in (8, 12):
        x = torch.randn(2, 3, size, size)
        agree(chain(x), net(x))


@needs_numba
@pytest.mark.parametrize("way", WAYS)
def test_a_nan_stays_where_it_is(way: str) -> None:
    net = sparse(nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)), 1.0)
    x = torch.randn(30, 20)
    x[3, 5] = torch.nan
    found = Chain(list(net), (20,), way)(x)
    assert found[3].isnan().all()
    assert found.isnan().sum() == 4


@needs_numba
def test_pooling_keeps_a_nan() -> None:
    net = sparse(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2)), 1.0)
    x = torch.randn(3, 1, 8, 8)
    x[1, 0, 2, 2] = torch.nan
    torch.testing.assert_close(Chain(list(net), (1, 8, 8), "panels of 1")(x), net(x), equal_nan=True)


@needs_numba
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threads", [1, 2])
def test_several_threads_at_once(way: str, threads: int) -> None:
    before = torch.get_num_threads()
    net = sparse(mlp(IMAGE, 10, (300, 200)), 0.1)
    chain = Chain(list(net), IMAGE, way)
    inputs = [torch.randn(1 + 40 * (i % 4), *IMAGE) for i in range(24)]
    try:
        torch.set_num_threads(threads)
        wanted = [net(x) for x in inputs]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                for found, right in zip(pool.map(chain, inputs), wanted, strict=True):
                    agree(found, right)
    finally:
        torch.set_num_threads(before)


@needs_numba
def test_other_threads_than_when_it_was_first_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_bregman.inference.chain.ONE_THREAD_WORK", 0)
    net = sparse(mlp(IMAGE, 10, (300, 200)), 0.1)
    chain, x = Chain(list(net), IMAGE, "panels of 1"), torch.randn(100, *IMAGE)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 1, 4):
            torch.set_num_threads(threads)
            agree(chain(x), net(x))
    finally:
        torch.set_num_threads(before)


@needs_numba
@pytest.mark.parametrize(
    ("modules", "shape"),
    [
        ([nn.Softmax(1)], (4,)),
        ([nn.Linear(4, 4), nn.Softmax(1)], (4,)),
        ([nn.Linear(4, 4)], (3, 4)),
        ([nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")], (2, 5, 5)),
        ([nn.Conv2d(2, 2, 2, padding="same")], (2, 5, 5)),
        ([nn.Conv2d(2, 2, 1), nn.SiLU(), nn.MaxPool2d(2)], (2, 4, 4)),
        ([nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, ceil_mode=True)], (2, 5, 5)),
        ([nn.Linear(4, 4), nn.ReLU(), nn.Tanh()], (4,)),
        ([nn.Linear(4, 4).double()], (4,)),
    ],
)
def test_what_is_no_chain(modules: list[nn.Module], shape: tuple[int, ...]) -> None:
    with pytest.raises(Unfit):
        Chain(modules, shape, "panels of 1")


# ---- The whole


@needs_numba
@pytest.mark.parametrize("winner", ["sparse", "dense", "dense, simplified", "dense, channels last"])
@pytest.mark.parametrize("batch", [1, 20])
def test_networks(monkeypatch: pytest.MonkeyPatch, winner: str, batch: int) -> None:
    favour(monkeypatch, winner)
    for net, shape in (
        (sparse(mlp(IMAGE, 10, (60, 50)), 0.1), IMAGE),
        (sparse(convnet(IMAGE, 10), 0.05), IMAGE),
        (sparse(mlp(IMAGE, 10, (60, 50)), 0.0), IMAGE),
    ):
        before = copy.deepcopy(net.state_dict())
        fast = optimize_for_inference(net, (torch.randn(batch, *shape),))
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        for n in (batch, 1, 7):
            x = torch.randn(n, *shape)
            agree(fast(x), net(x))
        assert fast.report.result.startswith(winner) or (winner.endswith("last") and fast.report.result == "dense")
        assert (len(chains(fast)) == 1) == (winner == "sparse")
        assert fast.report.batch == batch
        assert not any(p.requires_grad for p in fast.parameters())


class Block(nn.Module):
    """The MLP of a transformer: norm, two layers and GELU, and a sum around them; then a head on some of it."""

    def __init__(self, layer: type[nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.act, self.down = layer(24, 48), nn.GELU(), layer(48, 24)
        self.merge, self.head = nn.Linear(24, 6), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.act(self.up(self.norm(x))))
        return self.head(self.merge(x[..., :2, :]).flatten(-2))


@needs_numba
@pytest.mark.parametrize("winner", ["sparse", "dense"])
@pytest.mark.parametrize("leading", [(4, 7), (7,), (2, 3, 7)])
def test_tokens(monkeypatch: pytest.MonkeyPatch, winner: str, leading: tuple[int, ...]) -> None:
    favour(monkeypatch, winner)
    net = sparse(Block(), 0.2)
    fast = optimize_for_inference(net, (torch.randn(*leading, 24),))
    for other in (leading, (9, 2), (1, 40), (0, 3), (2, 2, 5), (3,)):
        x = torch.randn(*other, 24)
        agree(fast(x), net(x))
        agree(fast(x.mT.contiguous().mT), net(x))
    if winner == "sparse":
        assert [c.chosen for c in fast.report.layers] == ["sparse"] * 4, fast.report
        assert [len([m for m in c.dense if hasattr(m, "weight")]) for c in chains(fast)] == [2, 1, 1]


@needs_numba
def test_rows_after_flattening_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    favour(monkeypatch, "sparse")
    net = sparse(nn.Sequential(nn.Flatten(0, 1), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 12)), 0.3)
    fast = optimize_for_inference(net, (torch.randn(3, 4, 24),))
    assert [c.chosen for c in fast.report.layers] == ["sparse"] * 2
    agree(fast(torch.ones(2, 5, 24)), net(torch.ones(2, 5, 24)))


@needs_numba
def test_a_linear_layer_on_the_rows_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of a convolution and goes into it are other samples."""
    favour(monkeypatch, "sparse")
    net = sparse(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Linear(8, 6), nn.Flatten(),
                               nn.Linear(3 * 5 * 6, 4)), 0.4)  # fmt: skip
    fast = optimize_for_inference(net, (torch.randn(3, 2, 5, 8),))
    assert [c.chosen for c in fast.report.layers] == ["sparse"] * 3
    assert len(chains(fast)) == 3
    for batch in (3, 1, 20):
        x = torch.randn(batch, 2, 5, 8)
        agree(fast(x), net(x))


class Named(nn.Linear):
    """A Linear by another name."""


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Turned(nn.Module):
    """Its weight lies as [inputs, outputs], and its kind says so."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))
        self.given, self.made = inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.given), self.weight).view(*x.shape[:-1], self.made)


class TurnedKind(WeightedSum):
    rows_are_outputs = False
    counts = ("made", "given")


@needs_numba
@pytest.mark.parametrize(("layer", "known"), [(Named, True), (Turned, True), (Doubled, False)])
def test_layers_by_other_names(monkeypatch: pytest.MonkeyPatch, layer: type[nn.Module], known: bool) -> None:
    monkeypatch.setitem(REGISTRY, Turned, TurnedKind(Turned))
    favour(monkeypatch, "sparse")
    net = sparse(Block(layer), 0.2)
    for module in net.modules():
        if isinstance(module, Turned):
            module.weight.data.mul_(torch.rand_like(module.weight) < 0.2)
    fast = optimize_for_inference(net, (torch.randn(4, 7, 24),))
    for leading in ((4, 7), (2, 3, 7)):
        x = torch.randn(*leading, 24)
        agree(fast(x), net(x))
    assert [type(m) for m in (net.up, net.down)] == [layer, layer]
    found = {c.name: c.chosen for c in fast.report.layers}
    assert found["up"] == found["down"] == ("sparse" if known else "dense")
    assert ("not called as a Doubled" in str(fast.report)) != known


@pairwise(
    {
        "batch_first": [True, False],
        "mask": [None, "causal", "added", "per head"],
        "padding": [None, "bool", "added"],
        "need_weights": [False, True],
        "average": [True, False],
        "widths": [(None, None), (10, 14)],
        "bias": [True, False],
        "single": [False, True],
    }
)
def test_split_attention_is_attention(
    batch_first: bool, mask: str | None, padding: str | None, need_weights: bool, average: bool, widths: Any,
    bias: bool, single: bool,
) -> None:  # fmt: skip
    whole = nn.MultiheadAttention(24, 3, kdim=widths[0], vdim=widths[1], batch_first=batch_first, bias=bias).eval()
    whole.requires_grad_(False)
    parts = split(whole)
    assert isinstance(parts, SplitAttention)
    x = [torch.randn(2, n, width or 24) for n, width in ((5, 24), (7, widths[0]), (7, widths[1]))]
    x = [t[0] if single else t if batch_first else t.transpose(0, 1) for t in x]
    given: dict[str, Any] = {"need_weights": need_weights, "average_attn_weights": average}
    if mask == "causal":
        given |= {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(1), "is_causal": True}
    elif mask is not None:
        given["attn_mask"] = torch.randn(*((3 if single else 6, 5, 7) if mask == "per head" else (5, 7)))
    if padding is not None:
        hidden = torch.tensor([[False] * 5 + [True] * 2, [False] * 7])[0 if single else slice(None)]
        hides = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        both_bool = padding == "bool" and mask in (None, "causal")  # torch wants them alike
        given["key_padding_mask"] = hidden if both_bool or mask == "causal" else hides
    for found, wanted in zip(parts(*x, **given), whole(*x, **given), strict=True):
        assert (found is None) == (wanted is None)
        if wanted is not None:
            agree(found, wanted)


class Encoder(nn.Module):
    """With padding or without, as a classifier of sentences."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24)), nn.Linear(24, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


ENCODERS: dict[str, Any] = {
    "layer": lambda: nn.TransformerEncoderLayer(24, 2, 48, batch_first=True),
    "layer in a network": lambda: nn.Sequential(
        nn.TransformerEncoderLayer(24, 2, 48, activation="gelu", norm_first=True, batch_first=True), nn.Linear(24, 24)
    ),
    "encoder": lambda: nn.Sequential(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 2, 48, batch_first=True), 2), nn.Linear(24, 24)
    ),
    "decoder": lambda: Decoder(),
    "padded": Encoder,
}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(24, 2, 48, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


@needs_numba
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_and_decoders(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    favour(monkeypatch, "sparse")
    net = sparse_init_(ENCODERS[name](), 0.2).eval().requires_grad_(False)
    fast = optimize_for_inference(net, (torch.randn(4, 7, 24),))
    assert {c.chosen for c in fast.report.layers} == {"sparse"}, fast.report
    assert not any(chains(m) for n, m in fast.named_modules() if n.endswith(".whole"))
    for leading in ((4, 7), (1, 3), (6, 20)):
        x = torch.randn(*leading, 24)
        agree(fast(x), net(x))
        if name == "padded":
            padding = torch.arange(leading[1])[None] >= torch.arange(1, leading[0] + 1)[:, None]
            agree(fast(x, padding), net(x, padding))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        agree(other(x), net(x))


class Branches(nn.Module):
    """A bit of everything that a chain ends at."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.two, self.twice = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.hidden, self.last = nn.Linear(128, 30), nn.Linear(30, 5)
        self.norm_last = nn.BatchNorm1d(30)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = F.relu(self.norm(self.one(x)), inplace=True)
        x = x + torch.tanh(self.two(x))
        x = self.twice(self.twice(x).relu())
        x = F.max_pool2d(F.relu(x), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.gelu(self.norm_last(self.hidden(x))), 0.5, self.training)
        return self.last(x).softmax(1) * scale


def trained_norms(net: nn.Module, shape: tuple[int, ...]) -> None:
    net.train()
    for _ in range(3):
        net(torch.randn(16, *shape))


@needs_numba
@pytest.mark.parametrize("winner", ["sparse", "dense", "dense, simplified", "dense, channels last"])
def test_norms_branches_and_functions(monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    net = sparse(Branches(), 0.3)
    trained_norms(net, (3, 8, 8))
    favour(monkeypatch, winner)
    fast = optimize_for_inference(net, (torch.randn(6, 3, 8, 8),))
    assert net.training
    net.eval()
    for batch in (6, 1, 40):
        x = torch.randn(batch, 3, 8, 8)
        agree(fast(x), net(x))
    assert fast.report.result.startswith(winner)
    assert any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fast.modules()) == (winner == "dense")
    assert [c.name for c in fast.report.layers] == ["one", "two", "twice", "twice", "hidden", "last"]
    if winner != "sparse":
        return
    # conv + relu | conv + tanh | conv + relu, conv + relu + pool + flatten, linear + gelu, linear
    assert [len([m for m in c.dense if hasattr(m, "weight")]) for c in chains(fast)] == [1, 1, 4]


@needs_numba
def test_a_residual_network(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparse(resnet18((3, 16, 16), 10), 0.05)
    trained_norms(net, (3, 16, 16))
    net.eval()
    favour(monkeypatch, "sparse")
    monkeypatch.setattr(choice, "WAYS", WAYS[1:2])
    fast = optimize_for_inference(net, (torch.randn(4, 3, 16, 16),))
    for batch in (4, 1):
        x = torch.randn(batch, 3, 16, 16)
        agree(fast(x), net(x))
    assert fast.report.result.startswith("sparse")
    assert "BatchNorm folded into the layer before it: 20." in fast.report.notes


class Asks(nn.Module):
    """torch.fx cannot follow the question."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.unused = nn.Conv2d(1, 4, 3), nn.Linear(144, 12), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu().flatten(1)
        return self.two(x) if x.sum() > 0 else 2 * self.two(x)


@needs_numba
def test_what_cannot_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparse(Asks(), 0.3)
    favour(monkeypatch, "sparse")
    fast = optimize_for_inference(net, (torch.randn(6, 1, 8, 8),))
    for batch in (6, 1, 30):
        x = torch.randn(batch, 1, 8, 8)
        agree(fast(x), net(x))
    assert len(chains(fast)) == 2
    assert any("cannot trace" in note for note in fast.report.notes)
    assert "not called" in str(fast.report)


class Peeks(nn.Module):
    """Reads a weight of a layer itself, and cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.layer.weight if x.sum() > -1e9 else x


@needs_numba
def test_a_network_that_looks_into_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds there what it looks for."""
    net = sparse(Peeks(), 0.5)
    favour(monkeypatch, "sparse")
    x = torch.randn(4, 6)
    fast = optimize_for_inference(net, (x,))
    agree(fast(x), net(x))
    assert len(chains(fast)) == 1
    with pytest.raises(AttributeError, match="nothing"):
        chains(fast)[0].nothing  # noqa: B018
    with pytest.raises(AttributeError, match="weight"):
        Chain([nn.Linear(2, 2), nn.Linear(2, 2)], (2,), "columns").weight  # noqa: B018


@needs_numba
def test_a_hook_is_still_called(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparse(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), 0.5)
    net[0].register_forward_hook(lambda module, args, y: 3 * y)
    favour(monkeypatch, "sparse")
    x = torch.randn(4, 6)
    fast = optimize_for_inference(net, (x,))
    agree(fast(x), net(x))


@needs_numba
def test_a_layer_that_differs_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparse(nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30)), 0.5)
    favour(monkeypatch, "sparse")
    right = Chain.forward
    monkeypatch.setattr(Chain, "forward", lambda self, x: 1.0001 * right(self, x))
    fast = optimize_for_inference(net, (torch.randn(4, 30),))
    assert not chains(fast)
    assert "differs by more than" in str(fast.report)


def test_a_large_dense_network_is_not_made_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    favour(monkeypatch, "dense")
    net = mlp(IMAGE, 10, (100, 50)).eval()
    x = torch.randn(64, *IMAGE)
    fast = optimize_for_inference(net, (x,))
    agree(fast(x), net(x))
    assert fast.report.result == "dense"
    assert fast.report.seconds == fast.report.dense
    assert "Nothing was faster" in str(fast.report)


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda: False)
    net = sparse(convnet(IMAGE, 10), 0.05)
    x = torch.randn(8, *IMAGE)
    fast = optimize_for_inference(net, (x,))
    agree(fast(x), net(x))
    assert not chains(fast)
    assert "torch-bregman[fast]" in str(fast.report)
    assert all(choice.chosen == "dense" for choice in fast.report.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_dense(dtype: torch.dtype) -> None:
    net = sparse(mlp(IMAGE, 10, (60, 50)), 0.1).to(dtype)
    x = torch.randn(8, *IMAGE, dtype=dtype)
    fast = optimize_for_inference(net, (x,))
    torch.testing.assert_close(fast(x), net(x))
    assert not chains(fast)
    if kernels.available():
        assert str(dtype) in str(fast.report)


def test_the_report_is_a_table() -> None:
    net = sparse(mlp(IMAGE, 10, (60, 50)), 0.1)
    report = optimize_for_inference(net, (torch.randn(8, *IMAGE),)).report
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "weight", "density", "dense", "µs", "sparse", "µs", "chosen", "why"]
    assert [line.split()[0] for line in lines[1:4]] == ["1", "3", "5"]
    assert f"batch 8, {torch.get_num_threads()} threads: dense" in lines[4]


@needs_numba
def test_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    favour(monkeypatch, "sparse")
    net = sparse(convnet(IMAGE, 10), 0.05)
    x = torch.randn(20, *IMAGE)
    fast = optimize_for_inference(net, (x,))
    wanted = net(x)
    copied, loaded = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    del fast
    for other in (copied, loaded):
        assert isinstance(other, InferenceModule)
        agree(other(x), wanted)
        assert str(other.report) == str(copied.report)


@needs_numba
def test_random_numbers_and_gradients_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    favour(monkeypatch, "sparse")
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    x = torch.randn(4, 8)
    state = torch.get_rng_state()
    fast = optimize_for_inference(net, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
    agree(fast(x), copy.deepcopy(net).eval()(x))


def test_bad_arguments() -> None:
    net = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="`model` is str"):
        optimize_for_inference("net", (torch.randn(1, 4),))  # type: ignore[arg-type]
    for wrong in (torch.randn(1, 4), [torch.randn(1, 4)], (), (3,)):
        with pytest.raises(TypeError, match="`example_inputs` is"):
            optimize_for_inference(net, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`example_inputs` do not fit: Linear raised RuntimeError"):
        optimize_for_inference(net, (torch.randn(1, 5),))
