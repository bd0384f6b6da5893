"""The smaller network of a network with dead units: the same outputs, the same gradients, nothing changed behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from cases import pairwise
from torch import Tensor, nn
from torch.nn import functional as F

from torch_bregman.models.resnet import ResNet
from torch_bregman.multilevel.compact import CompactNetwork
from torch_bregman.multilevel.live import Live
from torch_bregman.network import kinds
from torch_bregman.network.graph import Graph, Untraceable
from torch_bregman.network.trace import leaving_unchanged, without_noise
from torch_bregman.part import Part

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SEEDS = range(3)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# ---- networks: each with an example input


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 5, 3, padding="same")
        self.c = nn.Linear(11 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x), inplace=True)
        b = F.leaky_relu(self.b(a), 0.2)
        both = F.max_pool2d(torch.cat([a, b], 1), 2)
        return self.c(both.view(both.size(0), -1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.up2 = nn.Sequential(nn.Conv2d(16, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.up1 = nn.Conv2d(6 + 6 + 2, 3, 3, padding=1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.avg_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, size=b.shape[-2:]), b], dim=1))
        return self.up1(torch.cat([self.upsample(b), a, x], dim=1))


class Separable(nn.Module):
    """Depthwise convolutions, with padding and without, and a gate as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.depth1 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
        self.point1 = nn.Sequential(nn.Conv2d(8, 10, 1), nn.SiLU())
        self.depth2 = nn.Conv2d(10, 10, 3, groups=10)
        self.gate = nn.Sequential(nn.Conv2d(10, 4, 1), nn.ReLU(), nn.Conv2d(4, 10, 1), nn.Sigmoid())
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth2(self.point1(self.depth1(self.stem(x))))
        x = x * self.gate(x.mean((2, 3), keepdim=True))
        return self.head(x.mean([2, 3]))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        widths = [4 + 3 * i for i in range(4)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(w) for w in widths])
        self.layers = nn.ModuleList([nn.Conv2d(w, 3, 3, padding=1, padding_mode="circular") for w in widths])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        return self.head(torch.cat(features, 1))


class Attention(nn.Module):
    """A pre-norm block of a transformer, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.ff = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.ff(self.norm2(x))


class Mixer(nn.Module):
    """Linear layers over positions and over channels, with permuted dimensions between."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 10)
        self.norm = nn.BatchNorm1d(10)
        self.b = nn.Linear(10, 7)
        self.c = nn.Conv1d(7, 5, 3, stride=2, padding=1, dilation=2)
        self.d = nn.Linear(5 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x).transpose(1, 2)).tanh()
        x = self.c(self.b(x.permute(0, 2, 1)).transpose(-1, 1))
        return self.d(torch.sigmoid(2 * x - 1).flatten(1))


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cumsum(self.a(x), 1).matmul(self.b.weight.T).relu())


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(9, 3)
        self.norm, self.act = nn.BatchNorm1d(8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.b(self.norm(self.a(x)))))
        return self.d(self.act(self.c(self.act(self.b(x)))))


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(6 * 16, 3),
        )  # fmt: skip


class InPlace(nn.Module):
    """What one branch writes in place the other sees."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.c(self.b(a.sigmoid_()) * a)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))


def mlp_norm() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8, bias=False), nn.BatchNorm1d(8, momentum=None),
        nn.Tanh(), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3),
    )  # fmt: skip


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1), nn.Conv2d(6, 7, 3, padding=1),
        nn.BatchNorm2d(7), nn.GELU(), nn.AvgPool2d(2, 1, padding=1), nn.Conv2d(7, 5, 3, 2, padding=(0, 2)), nn.ELU(),
        nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Flatten(), nn.Linear(30, 6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip


def volume() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 5, 2), nn.AdaptiveMaxPool3d(1),
        nn.Flatten(), nn.Linear(5, 2),
    )  # fmt: skip


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(first, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 5)),
    "mlp with norms": (mlp_norm, (6, 5)),
    "convnet": (convnet, (4, 2, 8, 8)),
    "volume": (volume, (3, 1, 4, 4, 4)),
    "resnet": (lambda: ResNet(2, 3, width=4), (4, 2, 9, 9)),
    "unet": (UNet, (3, 2, 8, 8)),
    "separable": (Separable, (3, 2, 8, 8)),
    "dense": (Dense, (3, 2, 6, 6)),
    "attention": (Attention, (2, 5, 8)),
    "encoder": (encoder, (2, 5, 8)),
    "mixer": (Mixer, (3, 7, 6)),
    "functional": (Functional, (3, 2, 6, 6)),
    "unknown": (Unknown, (4, 5)),
    "reused": (Reused, (4, 5)),
    "grouped": (Grouped, (3, 2, 8, 8)),
    "in place": (InPlace, (4, 5)),
}


def prepare(name: str, seed: int, death: float = 0.5, keep: tuple[str, ...] = ()) -> tuple[nn.Module, dict, Tensor]:
    """A network with random shifts and statistics, of whose units a share is dead; which live; and an input."""
    torch.manual_seed(seed)
    build, shape = NETWORKS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.weight, 1.0, 0.3)
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.num_batches_tracked.fill_(7)
        elif isinstance(module, LAYERS) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model, kill(model, death, keep), torch.randn(shape)


def kill(model: nn.Module, death: float, keep: tuple[str, ...] = ()) -> dict[str, Tensor]:
    alive = {}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and name not in keep:
            alive[name] = torch.rand(len(module.weight)) >= death
            module.weight.data[~alive[name]] = 0
    return alive


def gradients(model: nn.Module, parameters: list[Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    torch.manual_seed(0)
    y = model(x)
    loss = (y * torch.randn_like(y)).sum()
    return y, torch.autograd.grad(loss, parameters, allow_unused=True)


def agree(compact: CompactNetwork, x: Tensor) -> None:
    """Outputs, gradients of the live parts, and gradients of the parameters that are shared."""
    parts = {id(live.values): live for live in compact.lives}
    layers = [m for m in compact.model.modules() if hasattr(m, "rows")]
    small = list(compact.model.parameters())
    wanted, full = gradients(compact.original, [parts[id(p)].full if id(p) in parts else p for p in small], x)
    got, grads = gradients(compact.model, small, x)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert parts.keys() <= {id(p) for p in small}
    for p, grad, other in zip(small, grads, full, strict=True):
        if other is None:  # not used at all
            assert grad is None
            continue
        if id(p) in parts:
            other = parts[id(p)].where.restrict(other)
        rows = next((m.rows for m in layers if m.weight is p), None)
        if rows is not None:  # filters of a depthwise layer whose channels are not there rest
            other = torch.zeros_like(other).index_copy(0, rows, other[rows])
        torch.testing.assert_close(grad, other, rtol=1e-9, atol=1e-10)
    assert all(p in set(compact.original.parameters()) for p in small if id(p) not in parts)


def difference(compact: CompactNetwork, x: Tensor) -> float:
    """The largest difference between the outputs of both networks, without dropout; nothing changes."""
    outputs = []
    for model in (compact.original, compact.model):
        with leaving_unchanged(model):
            without_noise(model, norms=False)
            outputs.append(model(x.clone()))
    return float((outputs[0] - outputs[1]).abs().max())


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def compacted(graph: Graph, alive: dict[str, Tensor]) -> CompactNetwork:
    """As in a coarse phase: of each named layer the optimizer holds the live rows."""
    lives = []
    for name, mask in alive.items():
        weight = graph.model.get_submodule(name).weight
        lives.append(Live(weight, Part(weight, tuple(range(1, weight.dim())), mask.nonzero().view(-1))))
    return CompactNetwork(graph, graph.cut(alive), lives)


def make(model: nn.Module, alive: dict[str, Tensor], x: Tensor) -> CompactNetwork:
    return compacted(Graph(model, (x,)), alive)


@pairwise({"name": list(NETWORKS), "training": [True, False], "seed": SEEDS})
def test_same_outputs_and_gradients(name: str, training: bool, seed: int) -> None:
    model, alive, x = prepare(name, seed)
    compact = make(model.train(training), alive, x)
    assert compact.model.training == training
    agree(compact, x)
    agree(compact, torch.randn_like(torch.cat([x, x])))
    assert size(compact.model) < size(model)
    assert difference(compact, x) < 1e-10


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.deep, self.norm = nn.Conv2d(width, width, 5, padding=2, groups=width), nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.scale = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.deep(x).permute(0, 2, 3, 1))
        return x + (self.b(F.gelu(self.a(y))) * self.scale).permute(0, 3, 1, 2)


class Beside(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def drawn(seed: int) -> tuple[nn.Sequential, Tensor]:
    """Convolutions with any groups, stride, padding and dilation, in the blocks of MobileNet, Xception and ConvNeXt."""
    rng = random.Random(seed)
    x = image = torch.randn(3, rng.choice([2, 3, 4]), 12, 12)
    layers: list[nn.Module] = []
    for _ in range(rng.randint(3, 6)):
        width = x.shape[1]
        kernel, stride, dilation = rng.choice([1, 2, 3, (3, 1)]), rng.choice([1, 1, 2]), rng.choice([1, 1, 2])
        options = {
            "stride": stride, "padding": rng.choice([0, 0, 1, 2]), "dilation": dilation, "bias": rng.random() < 0.7,
            "padding_mode": rng.choice(["zeros", "zeros", "reflect", "circular"]),
        }  # fmt: skip
        parts = rng.choice([d for d in (1, 2, 3, 4) if width % d == 0])
        deep = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        block = rng.choice(
            [
                [nn.Conv2d(width, rng.choice([4, 6]), kernel, **options)],
                [nn.Conv2d(width, width, kernel, groups=width, **options)],
                [nn.Conv2d(width, 2 * width, kernel, groups=width, **options)],
                [nn.Conv2d(width, 2 * parts, kernel, groups=parts, **options)],
                [nn.Conv2d(width, width, 3, groups=width), nn.Conv2d(width, 6, 1)],
                [
                    Beside(
                        nn.Conv2d(width, 2 * width, 1), nn.ReLU6(), deep, nn.Hardswish(), nn.Conv2d(2 * width, width, 1)
                    )
                ],
                [ConvNeXtBlock(width)],
                [nn.BatchNorm2d(width), rng.choice([nn.ReLU(), nn.GELU(), nn.Sigmoid()])],
                [nn.MaxPool2d(2)],
            ]
        )
        try:
            y = nn.Sequential(*block)(x)
        except RuntimeError:  # an image smaller than a kernel
            continue
        if 0 < y.numel() < 20_000:
            layers, x = [*layers, *block], y.detach()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(x[0].numel(), 3)), image


@pytest.mark.parametrize("seed", range(20))
def test_any_convolutions_one_after_the_other(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = drawn(seed)
    agree(make(model.train(seed % 3 > 0), kill(model, 0.5), x), x)


@pytest.mark.parametrize("death", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_few_or_all_units_dead(name: str, death: float) -> None:
    for training in (True, False):
        model, alive, x = prepare(name, 11, death)
        agree(make(model.train(training), alive, x), x)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_dead_nothing_cut(name: str) -> None:
    model, alive, x = prepare(name, 0, death=0.0)
    graph = Graph(model, (x,))
    assert graph.cut(alive) == graph.cut({}) == {}
    compact = CompactNetwork(graph, {}, [])
    assert compact.model is model
    assert not compact.lives


@pytest.mark.parametrize("name", NETWORKS)
def test_the_original_is_untouched(name: str) -> None:
    model, alive, x = prepare(name, 1)
    before = copy.deepcopy(model.state_dict())
    members = {n: dict(m.__dict__) for n, m in model.named_modules()}
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    compact = make(model, alive, x)
    difference(compact, x)
    assert torch.equal(random, torch.get_rng_state())
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == pointers
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    for n, m in model.named_modules():
        assert m.__dict__.keys() == members[n].keys()
        assert all(m.__dict__[key] is value for key, value in members[n].items())


def test_every_norm_has_its_own_mode() -> None:
    model, alive, x = prepare("resnet", 4)
    for i, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        module.train(i % 2 == 0)
    compact = make(model, alive, x)
    assert [m.training for m in compact.model.modules()] == [m.training for m in model.modules()]
    agree(compact, x)


def test_removed_units_of_an_mlp() -> None:
    model, alive, x = prepare("mlp", 0, keep=("4",))
    a, b = (int(alive[n].sum()) for n in ("0", "2"))
    compact = make(model, alive, x)
    assert size(compact.model) == (5 + 1) * a + (9 + 1) * b + (8 + 1) * 3  # live rows keep all their inputs
    assert compact.shares == {"0": a / 9, "2": a * b / 72, "4": b / 8}


def test_removed_filters_of_a_convnet() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 3),
    )  # fmt: skip
    nn.init.uniform_(model[1].bias, 0.5, 1)
    alive = kill(model, 0.5, keep=("7",))
    x = torch.randn(3, 2, 6, 6)
    graph = Graph(model, (x,))
    cuts = graph.cut(alive)
    a, b = int(alive["0"].sum()), int(alive["4"].sum())
    compact = compacted(graph, alive)
    assert size(compact.model) == (18 + 1) * a + 2 * a + (9 * 6 + 1) * b + (9 * 8 + 1) * 3
    # The shift of the norm is positive: the zeros around the image show in the next convolution.
    layer = compact.model[4]
    gone = layer.weight.view(b, *layer.row)[:, layer.gone]
    border = layer.kind.constant_image(layer, gone, layer.constants, (3, 3))
    assert border.shape == (b, 3, 3)
    assert not torch.equal(border[:, 0, 0], border[:, 1, 1])
    agree(compact, x)
    other = torch.randn(3, 2, 7, 8)  # of another size it is another border
    torch.testing.assert_close(compact.model[:6](other), model[:6](other)[:, cuts["4"].outputs])


def test_a_residual_stream_keeps_what_any_branch_writes() -> None:
    model, alive, x = prepare("resnet", 1)
    cuts = Graph(model, (x,)).cut(alive)
    stream = alive["stem.0"] | alive["blocks.0.conv2"] | alive["blocks.1.conv2"]
    assert 0 < stream.sum() < 4
    for name in ("stem.0", "stem.1", "blocks.0.conv2", "blocks.0.norm2", "blocks.1.conv2"):
        assert torch.equal(cuts[name].outputs, stream.nonzero().view(-1))
    for name in ("blocks.0.conv1", "blocks.1.conv1", "blocks.2.shortcut.0"):
        assert torch.equal(cuts[name].inputs, stream.nonzero().view(-1))
    assert torch.equal(cuts["blocks.1.conv2"].alive, (stream & alive["blocks.1.conv2"]).nonzero().view(-1))
    assert torch.equal(cuts["blocks.1.conv1"].outputs, alive["blocks.1.conv1"].nonzero().view(-1))


@pytest.mark.parametrize("name", ["attention", "encoder"])
def test_attention_stays_whole_and_hidden_units_go(name: str) -> None:
    model, alive, x = prepare(name, 0)
    cuts = Graph(model, (x,)).cut(alive)
    hidden = ["ff.0"] if name == "attention" else ["0.linear1", "1.layers.0.linear1", "1.layers.1.linear1"]
    for layer in hidden:
        assert torch.equal(cuts[layer].outputs, alive[layer].nonzero().view(-1))
    assert not any("attn" in layer or "attention" in layer for layer in cuts)
    model.eval()
    compact = make(model, alive, x)
    with torch.no_grad():  # here the original takes its fused kernel
        torch.testing.assert_close(compact.model(x), model(x), rtol=1e-9, atol=1e-9)


def test_barriers() -> None:
    """Unknown operations, reused modules, grouped convolutions: what touches them keeps its channels."""
    for name, whole, cut in (
        ("unknown", ["b"], {"a": 8, "c": 3}),
        ("reused", ["b"], {"a": 8, "c": 3, "d": 3}),
        ("in place", [], {"a": 8}),
    ):
        model, alive, x = prepare(name, 2)
        cuts = Graph(model, (x,)).cut(alive)
        assert not set(whole) & set(cuts)
        for layer, outputs in cut.items():
            if name != "reused" or layer != "c":
                assert len(cuts[layer].outputs) == outputs
    model, alive, x = prepare("reused", 2)
    cuts = Graph(model, (x,)).cut(alive)
    assert len(cuts["c"].outputs) == alive["c"].sum()
    assert len(cuts["c"].inputs) == 8


def test_tied_weights_and_hooks_are_barriers() -> None:
    model, alive, x = prepare("mlp", 0)
    model[2].register_forward_hook(lambda module, args, output: output + 1)
    compact = make(model, alive, x)
    agree(compact, x)
    assert compact.model[2] is model[2]
    assert compact.model[0].weight.shape == (int(alive["0"].sum()), 5)
    assert len(compact.model[0].bias) == 9
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    alive = kill(tied, 0.5, keep=("2",))
    compact = make(tied, alive, torch.randn(3, 4))
    agree(compact, torch.randn(3, 4))
    assert compact.model[0] is tied[0]


def test_dropout_keeps_what_it_would_make_random() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2))
    alive = {"0": torch.tensor([True, False, False, True, False, True])}
    model[0].weight.data[~alive["0"]] = 0
    model[0].bias.data.copy_(torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0, 1.0]))
    x = torch.randn(3, 4)
    graph = Graph(model, (x,))
    assert graph.cut(alive)["0"].outputs.tolist() == [0, 1, 3, 5]  # the ReLU makes zeros of units 2 and 4
    assert difference(compacted(graph, alive), x) < 1e-12
    model.eval()
    assert graph.cut(alive)["0"].outputs.tolist() == [0, 3, 5]
    agree(compacted(graph, alive), x)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.view(-1, 8) / 2,
        lambda x: x / x.size(1),
        lambda x: x / x.shape[-1],
        lambda x: x * torch.arange(8.0),
        lambda x: x.softmax(1),
        lambda x: F.layer_norm(x, (8,)),
        lambda x: x[:, :4].repeat(1, 2),
        lambda x: F.pad(x, (1, 1))[:, 1:-1],
        lambda x: F.max_pool1d(x, 3, 1, padding=1),
        lambda x: x + x.mean(1, keepdim=True),
        lambda x: torch.stack([x, x]).sum(0),
        lambda x: F.max_pool2d(x[:, None, :, None], 1).flatten(1),
    ],
)
def test_operations_that_need_all_channels(read: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(read(self.a(x)))

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5)
    alive = kill(model, 0.5)
    compact = make(model, alive, x)
    agree(compact, x)
    assert len(compact.model.a.bias) == 8
    assert compact.model.a.weight.shape == (int(alive["a"].sum()), 5)


def test_other_traces_by_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            x = self.a(x) if scale is None else self.a(x) * scale
            return self.b(x.relu() if self.training else x.tanh() + 1)

    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 5)
    alive = kill(model, 0.5)
    graph = Graph(model, (x,))
    agree(compacted(graph, alive), x)
    model.eval()
    agree(compacted(graph, alive), x)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    """Computes something else in every call."""

    calls = 1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(("model", "match"), [(Branches(), "control flow"), (Counts(), "does not compute")])
def test_untraceable(model: nn.Module, match: str) -> None:
    with pytest.raises(Untraceable, match=match):
        Graph(model, (torch.randn(2, 3),))


@pytest.mark.parametrize(
    ("alive", "match"),
    [
        ({"9": torch.ones(9, dtype=torch.bool)}, "no such module"),
        ({"1": torch.ones(9, dtype=torch.bool)}, "expected Linear"),
        ({"0": torch.ones(8, dtype=torch.bool)}, r"expected bool \(9,\)"),
        ({"0": torch.ones(9)}, "expected bool"),
        ({"0": torch.zeros(9, dtype=torch.bool)}, "not zero"),
    ],
)
def test_masks_that_do_not_fit(alive: dict[str, Tensor], match: str) -> None:
    model, _, x = prepare("mlp", 0, death=0.0)
    with pytest.raises(ValueError, match=match):
        Graph(model, (x,)).cut(alive)


def test_restrict_and_prolong() -> None:
    model, alive, x = prepare("convnet", 0)
    parts = [(live.full, live.where, live.values) for live in make(model, alive, x).lives]
    for full in model.parameters():
        # A block: every other index of the first and third dimension.
        index = tuple(torch.arange(0, n, 2) if d % 2 == 0 else None for d, n in enumerate(full.shape[:3]))
        where = Part(full, index=index)
        block = full[::2] if full.dim() < 3 else full[::2, :, ::2]
        assert torch.equal(full.detach().view(-1)[where.index], block.reshape(-1))
        assert len(where) == where.size == block.numel()
        assert where.density == block.numel() / full.numel()
        parts.append((full, where, block))
    for weight, part, small in parts:
        full = torch.randn_like(weight)
        values = part.restrict(full)
        assert values.shape == small.shape
        assert values.is_contiguous()
        assert torch.equal(part.restrict(weight), small)
        for zeros in (True, False):
            target = torch.randn_like(full)
            rest = torch.zeros_like(full) if zeros else target.clone()
            part.prolong(values, target, zeros=zeros)
            assert torch.equal(part.restrict(target), values)
            part.prolong(part.restrict(rest), target)
            assert torch.equal(target, rest)


@pytest.mark.parametrize("name", ["mlp with norms", "resnet", "unet"])
def test_training_in_the_small_network_and_back(name: str) -> None:
    """As training the original with the gradients of everything that was left out masked."""
    model, alive, x = prepare(name, 3)
    twin = copy.deepcopy(model)
    steps = 4
    graph = Graph(model, (x,))
    compact = compacted(graph, alive)
    masks = {id(p): torch.ones_like(p) for p in model.parameters()}
    for live in compact.lives:
        masks[id(live.full)] = torch.zeros_like(live.full)
        live.where.prolong(torch.ones_like(live.values), masks[id(live.full)])
    ours = torch.optim.SGD(compact.model.parameters(), 0.05)
    pairs = list(zip(twin.parameters(), model.parameters(), strict=True))
    for _ in range(steps):
        batch = torch.randn_like(x)
        ours.zero_grad()
        compact.model(batch).square().mean().backward()
        ours.step()
        twin.zero_grad()
        twin(batch).square().mean().backward()
        with torch.no_grad():
            for p, original in pairs:
                p -= 0.05 * p.grad * masks[id(original)]
    for live in compact.lives:
        live.write()
    compact.passes = steps
    compact.update_statistics()
    for (key, got), wanted in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    agree(compacted(graph, alive), x)


# ---- what oneDNN gets wrong


@pytest.mark.parametrize("channels", [2, 4, 7, 12])
def test_strided_convolutions_of_few_channels_on_channels_last_images(channels: int) -> None:
    last = torch.channels_last
    layer = nn.Conv2d(channels, 8, 1, stride=2, dtype=torch.float32).to(memory_format=last)
    images = torch.randn(32, channels, 15, 16, dtype=torch.float32)
    exact, grad = copy.deepcopy(layer).double(), torch.randn(32, 8, 8, 8, dtype=torch.float32)
    outputs = []
    for module, x in ((layer, images.contiguous(memory_format=last)), (exact, images.double())):
        x.requires_grad_()
        y = kinds.of(module).dense(module, x, module.weight, module.bias)
        y.backward(grad.to(y.dtype))
        outputs.append([y.detach(), x.grad, module.weight.grad, module.bias.grad])
    for got, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
