"""Shrinking: the same outputs from smaller stock modules, what stays and why, and an optimizer that goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import pairwise
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb
from torch_bregman.models import convnet
from torch_bregman.models.resnet import ResNet
from torch_bregman.network.attention import Attention
from torch_bregman.shrink import compact

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


# ---- thirteen architectures


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        widths = [12 + 8 * i for i in range(4)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(w) for w in widths])
        self.layers = nn.ModuleList([nn.Conv2d(w, 8, 3, padding=1, bias=False) for w in widths])
        self.last = nn.BatchNorm2d(widths[-1] + 8)
        self.head = nn.Linear(widths[-1] + 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = torch.cat([x, layer(F.relu(norm(x)))], 1)
        return self.head(F.adaptive_avg_pool2d(self.last(x).relu(), 1).flatten(1))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()

        def block(n: int, out: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(n, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
                nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(),
            )  # fmt: skip

        self.down1, self.down2, self.middle = block(3, 8), block(8, 12), block(12, 16)
        self.up2, self.up1 = block(16 + 12, 12), block(10 + 8, 8)
        self.lift = nn.ConvTranspose2d(12, 10, 3, stride=2, padding=1, output_padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        b = self.up2(torch.cat([F.interpolate(c, scale_factor=2.0), b], 1))
        return self.out(self.up1(torch.cat([self.lift(b), a], 1)))


class MobileNet(nn.Module):
    """Depthwise separable blocks with inverted residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU6())
        self.blocks = nn.ModuleList([self.block(10, 24, 10), self.block(10, 24, 10), self.block(10, 20, 14)])
        self.head = nn.Linear(14, 4)

    @staticmethod
    def block(n: int, wide: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(n, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = x + block(x) if i < 2 else block(x)
        return self.head(x.mean((2, 3)))


class ResNeXt(nn.Module):
    """Grouped convolutions and GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.GroupNorm(8, 16), nn.GELU())
        self.head = nn.Sequential(nn.Conv2d(16, 12, 1), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten())
        self.last = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.body(self.stem(x))))


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Block(nn.Module):
    """A transformer block written by hand around nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Attends(nn.Module):
    """A transformer block that does everything itself, in one of the usual ways."""

    def __init__(self, way: str = "sdpa", heads: int = 4, width: int = 12) -> None:
        super().__init__()
        self.way, self.heads = way, heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if way in ("sdpa", "softmax", "flatten"):
            self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        else:
            self.qkv = nn.Linear(width, 3 * width)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 40), nn.Linear(40, width)
        self.dropout = nn.Dropout(0.1)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        b, t, c = x.shape
        h = self.heads
        if self.way in ("sdpa", "softmax"):
            layers = (self.query, self.key, self.value)
            return tuple(layer(x).view(b, t, h, c // h).transpose(1, 2) for layer in layers)
        if self.way == "flatten":
            layers = (self.query, self.key, self.value)
            return tuple(layer(x).unflatten(-1, (h, 3)).permute(0, 2, 1, 3) for layer in layers)
        if self.way == "vit":
            q, k, v = self.qkv(x).reshape(b, t, 3, h, c // h).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        if self.way == "items":
            qkv = self.qkv(x).reshape(b, t, 3, h, c // h).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        q, k, v = self.qkv(x).split(c, dim=2) if self.way == "gpt" else self.qkv(x).chunk(3, dim=-1)
        return tuple(part.view(b, t, h, c // h).transpose(1, 2) for part in (q, k, v))

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.projections(self.norm1(x))
        if self.way in ("softmax", "vit"):
            scores = (q @ k.transpose(-2, -1)) * (1.0 / 3**0.5)
            y = self.dropout(scores.softmax(dim=-1)) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.way == "gpt")
        y = y.transpose(1, 2)
        y = y.flatten(2) if self.way == "flatten" else y.contiguous().view(b, t, c)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


WAYS = ["sdpa", "softmax", "flatten", "vit", "items", "gpt", "chunk"]


class Words(nn.Module):
    """An embedding whose columns are units, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.hidden, self.gate, self.out = nn.Linear(24, 30), nn.Linear(24, 30), nn.Linear(30, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).mean(1)
        return self.out(torch.tanh(self.hidden(x)) * torch.sigmoid(self.gate(x)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 30, bias=False), nn.BatchNorm1d(30), nn.Tanh(),
        nn.Dropout(), nn.Linear(30, 5),
    )  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for n, out in ((3, 12), (12, 12), (12, 20)):
        layers += [nn.Conv2d(n, out, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 30), nn.LeakyReLU(0.1), nn.Linear(30, 4))


def sound() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 12, 5, stride=2, padding=2, padding_mode="circular"), nn.BatchNorm1d(12), nn.ELU(),
        nn.Conv1d(12, 10, 3, dilation=2), nn.SiLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(10 * 6, 3),
    )  # fmt: skip


IMAGE = (4, 3, 8, 8)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 3, 4, 4)),
    "convnet": (lambda: convnet((1, 28, 28), 10), (3, 1, 28, 28)),
    "vgg": (vgg, IMAGE),
    "resnet18": (lambda: ResNet(3, 10, width=8), (2, 3, 16, 16)),
    "densenet": (DenseNet, IMAGE),
    "mobilenet": (MobileNet, IMAGE),
    "unet": (UNet, IMAGE),
    "resnext": (ResNeXt, IMAGE),
    "encoder": (Encoder, (4, 7)),
    "block": (Block, (3, 6, 12)),
    "attends": (Attends, (2, 5, 12)),
    "words": (Words, (5, 6)),
    "sound": (sound, (3, 2, 32)),
}


def example(name: str) -> Tensor:
    shape = NETWORKS[name][1]
    return torch.randint(40, shape) if name in ("encoder", "words") else torch.randn(shape)


def lived(model: nn.Module) -> nn.Module:
    """Norms with statistics and shifts, as after training."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_()
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model


def kill(model: nn.Module, share: float, *, columns: bool = False) -> None:
    """Zero this share of the units: rows and filters, of attention whole heads, of embeddings columns."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            module.weight.data[torch.rand(len(module.weight)) < share] = 0
            if columns:
                module.weight.data[:, torch.rand(module.weight.shape[1]) < share] = 0
        elif isinstance(module, nn.MultiheadAttention):
            module.in_proj_bias.data.normal_()
            heads = (torch.rand(module.num_heads) < share).repeat_interleave(module.head_dim)
            module.in_proj_weight.data[2 * module.embed_dim :][heads] = 0
        elif isinstance(module, nn.Embedding):
            module.weight.data[:, torch.rand(module.embedding_dim) < share] = 0


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    """In float64, relative to the largest output."""
    pair = [copy.deepcopy(m).double().eval() for m in (a, b)]
    with torch.no_grad():
        y, z = (m(x.double() if x.is_floating_point() else x) for m in pair)
    return float((y - z).abs().max() / y.abs().max().clamp_min(1e-30))


@pairwise({"name": list(NETWORKS), "share": [0.5, 0.8, 0.95], "columns": {"rows": False, "columns": True}})
def test_same_outputs_from_a_smaller_network(name: str, share: float, columns: bool) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        model = lived(NETWORKS[name][0]())
        kill(model, share, columns=columns)
        before = copy.deepcopy(model.state_dict())
        small = tb.shrink(model, (example(name),))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        for _ in range(2):
            assert difference(model, small.model, example(name)) < 1e-5
        count = sum(p.numel() for p in small.model.parameters())
        assert small.report.parameters == (sum(p.numel() for p in model.parameters()), count)
        assert count < small.report.parameters[0]
        _dead_or_named(model, small)


def _dead_or_named(model: nn.Module, small: Any) -> None:
    """A unit without weights is gone, or its layer says why it is not."""
    for row in small.report.rows:
        old, new = model.get_submodule(row.name), small.model.get_submodule(row.name)
        if not isinstance(new, LAYERS):
            continue
        assert row.after == tuple(new.weight.shape[:2]) or new.groups > 1
        assert row.before[0] == len(old.weight)
        dead = int((new.weight.flatten(1) == 0).all(1).sum())
        assert dead <= row.kept
        assert not row.kept or row.reason
        if row.reason:
            assert len(row.reason) > 10


def test_out_come_stock_modules() -> None:
    for name, (build, _) in NETWORKS.items():
        torch.manual_seed(0)
        model = build()
        kill(model, 0.6)
        small = tb.shrink(model, (example(name),)).model
        for module in small.modules():
            kind = type(module)
            assert (
                kind.__module__.startswith("torch.nn")
                or kind is Attention
                or type(model).__module__ == kind.__module__
                or (kind.__module__.startswith("torch_bregman.models"))
            )
        assert type(small) is type(model)


def test_nothing_dead_nothing_changes() -> None:
    torch.manual_seed(0)
    model = mlp()
    small = tb.shrink(model, (torch.randn(6, 3, 4, 4),))
    assert small.report.parameters[0] == small.report.parameters[1]
    assert small.report.difference == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), small.model.parameters(), strict=True))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.model.parameters()}


def test_exact_sizes_of_a_chain() -> None:
    """Rows, unread columns, and what follows from them backwards and forwards."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        model[0].weight[:2] = 0  # dead: a constant relu(b)
        model[2].weight[3, 2:] = 0  # reads dead units only: a constant too
        model[4].weight[:, 5:] = 0  # nobody reads units 5 and 6 of layer 2 ...
        model[2].weight[:5, 5] = 0  # ... who alone read unit 5 of layer 0
    small = tb.shrink(model, (torch.randn(3, 5),))
    assert [tuple(m.weight.shape) for m in small.model if isinstance(m, nn.Linear)] == [(3, 5), (4, 3), (8, 4), (2, 8)]
    assert difference(model, small.model, torch.randn(9, 5)) < 1e-6


def test_a_zero_padding_needs_one_carrier() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 9, 3), nn.ReLU(), nn.Conv2d(9, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight[:7] = 0
        model[0].bias[:7] = torch.tensor([0.3, -1.0, 0.5, 2.0, 0.1, -0.2, 1.0])
    small = tb.shrink(model, (torch.randn(2, 1, 9, 9),))
    assert small.model[0].out_channels == 3  # two that live, and one for the five constants that are not zero
    row = small.report.rows[0]
    assert row.kept == 1
    assert "carries" in row.reason
    with torch.no_grad():  # where the constants vanish at the border as well, none is needed
        model[0].bias[:7] = -1
    assert tb.shrink(model, (torch.randn(2, 1, 9, 9),)).model[0].out_channels == 2


@pytest.mark.parametrize("name", ["vgg", "resnet18", "densenet", "mobilenet", "unet"])
def test_for_inference_images_take_the_place_of_carriers(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = lived(NETWORKS[name][0]()).eval()
        kill(model, 0.6)
        x = example(name)
        small, stock = compact(model, (x,)), tb.shrink(model, (x,)).model
        assert difference(model, small, x) < 1e-5
        sizes = [sum(p.numel() for p in m.parameters()) for m in (small, stock)]
        assert sizes[0] <= sizes[1]
    if name == "vgg":
        with pytest.raises(ValueError, match="smaller for inputs"):
            small[:4](torch.randn(1, 3, 20, 20))


def test_constants_reach_layers_without_bias() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 3, bias=False))
    with torch.no_grad():
        model[0].weight[1:3] = 0
    small = tb.shrink(model, (torch.randn(2, 4),)).model
    assert small[2].bias is not None
    assert difference(model, small, torch.randn(7, 4)) < 1e-6


def test_depthwise_filters_that_are_zero_free_their_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 3, 1)
    )
    with torch.no_grad():
        model[2].weight[:4] = 0
    small = tb.shrink(model, (torch.randn(2, 2, 5, 5),)).model
    assert (small[0].out_channels, small[2].groups, small[2].out_channels, small[4].in_channels) == (2, 2, 2, 2)


def test_heads_go_and_masks_stay() -> None:
    torch.manual_seed(0)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]

    model = Masked()
    with torch.no_grad():
        model.attention.in_proj_bias.normal_()
        model.attention.in_proj_weight[24:30] = 0  # the values of two heads
        model.attention.out_proj.weight[:, 9:] = 0  # and one that is not read
    x, mask = torch.randn(3, 5, 12), torch.ones(5, 5, dtype=torch.bool).triu(1)
    small = tb.shrink(model, (x, mask))
    attention = small.model.attention
    assert isinstance(attention, Attention)
    assert attention.heads == 1
    assert torch.allclose(model(x, mask), small.model(x, mask), atol=1e-5)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    for batch_first in (True, False):
        model.attention.batch_first = attention.batch_first = batch_first
        y = x if batch_first else x.transpose(0, 1)
        want = model.attention(y, y, y, key_padding_mask=padding)[0]
        assert torch.allclose(want, attention(y, y, y, key_padding_mask=padding)[0], atol=1e-5)


def test_an_encoder_of_torch_alone() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    for model in (layer, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)):
        kill(model, 0.6)
        small = tb.shrink(model, (torch.randn(2, 5, 16),))
        assert type(small.model) is type(model)
        assert all(model.get_submodule(row.name) is not None for row in small.report.rows)
        assert sum(row.after[0] < row.before[0] for row in small.report.rows) >= 2
        assert difference(model, small.model, torch.randn(3, 4, 16)) < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_heads_that_are_written_in_the_code(way: str) -> None:
    torch.manual_seed(0)
    model = Attends(way)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        values = model.value.weight if hasattr(model, "value") else model.qkv.weight[24:]
        values[3:6] = 0  # its values are a constant
        model.out.weight[:, 9:] = 0  # nobody reads it
    small = tb.shrink(model, (x,))
    assert difference(model, small.model, torch.randn(3, 7, 12)) < 1e-6
    assert small.model.get_submodule("out").in_features == 6
    fused = [p.shape for name, p in small.model.named_parameters() if name in ("qkv.weight", "query.weight")]
    assert fused == [(18, 12)] if hasattr(model, "qkv") else [(6, 12)]
    assert any("heads" in note for note in small.report.notes)
    # Training goes on in the original's own code, so there all heads stay.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = tb.shrink(model, (x,), optimizer)
    assert type(kept.model) is Attends
    assert kept.model.out.in_features == 12
    assert difference(model, kept.model, x) < 1e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("way", WAYS)
def test_rows_of_attention_that_die_at_random(way: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = Attends(way)
    kill(model, (0.5, 0.8, 0.95)[seed % 3], columns=seed > 3)
    small = tb.shrink(model, (torch.randn(2, 5, 12),))
    assert difference(model, small.model, torch.randn(3, 7, 12)) < 1e-6


def test_weights_of_attention_that_are_used_keep_all_heads() -> None:
    torch.manual_seed(0)

    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, weights = self.attention(x, x, x)
            return y, weights

    model = Shown()
    model.attention.in_proj_weight.data[16:20] = 0
    small = tb.shrink(model, (torch.randn(2, 3, 8),))
    assert isinstance(small.model.attention, nn.MultiheadAttention)
    (row,) = small.report.rows
    assert row.kept == 1
    assert "weights" in row.reason


def test_a_view_with_its_size_in_numbers() -> None:
    torch.manual_seed(0)

    class LeNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
            self.fc1, self.fc2 = nn.Linear(16 * 4 * 4, 40), nn.Linear(40, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.conv1(x)), 2)
            x = F.max_pool2d(F.relu(self.conv2(x)), 2).view(-1, 16 * 4 * 4)
            return self.fc2(F.relu(self.fc1(x)))

    model = LeNet()
    kill(model, 0.6)
    small = tb.shrink(model, (torch.randn(2, 1, 28, 28),))
    live = int(model.conv2.weight.flatten(1).any(1).sum())
    assert small.model.fc1.in_features == 16 * live
    assert difference(model, small.model, torch.randn(5, 1, 28, 28)) < 1e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolutions(stride: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 8, 3, stride, padding=1), nn.PReLU(), nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 1.0
        model[2].weight[:, 2:5] = 0
        model[2].weight[5] = 0  # nobody reads channel 5
    small = tb.shrink(model, (torch.randn(2, 2, 6, 6),)).model
    assert tuple(small[2].weight.shape[:2]) == (3, 5)  # two that live, a carrier
    assert difference(model, small, torch.randn(3, 2, 6, 6)) < 1e-6


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_low_rank_becomes_two_factors(kind: str) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(40, 30) if kind == "linear" else nn.Conv2d(8, 30, 3, stride=2, padding=1)
    shape = layer.weight.shape
    layer.weight.data = (torch.randn(30, 3) @ torch.randn(3, shape[1:].numel())).view(shape) / 10
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(2, 40) if kind == "linear" else torch.randn(2, 8, 7, 7)
    model(x)
    small = tb.shrink(model, (x,))
    assert small.report.rows[0].rank == 3
    assert small.report.parameters[1] < small.report.parameters[0] / 2
    assert difference(model, small.model, x) < 1e-5
    full = nn.Sequential(nn.Linear(9, 9))  # nothing to gain
    assert tb.shrink(full, (torch.randn(2, 9),)).report.rows[0].rank is None


def test_nuclear_norm_training_ends_in_factors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3))
    x = torch.randn(64, 40)
    y = torch.randn(64, 3)
    model[0].weight.data.zero_()
    rest = [model[0].bias, *model[2].parameters()]
    groups = [{"params": [model[0].weight], "regularizer": tb.NuclearNorm(), "lam": 0.05}, {"params": rest}]
    optimizer = tb.LinBreg(groups, lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    rank = int(torch.linalg.matrix_rank(model[0].weight))
    assert 0 < rank < 15
    small = tb.shrink(model, (x,))
    assert small.report.rows[0].rank == rank
    followed = tb.shrink(model, (x,), optimizer)
    assert followed.report.rows[0].rank is None
    assert any("two factors" in note for note in followed.report.notes)


def test_what_stays_and_why() -> None:
    torch.manual_seed(0)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 3)
            self.norm, self.a, self.b = nn.LayerNorm(20), nn.Linear(6 * 4, 20), nn.Linear(20, 20)
            self.c = nn.Linear(20, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).roll(1, 1).flatten(1)
            return self.c(self.b(self.norm(self.a(x)) + 1))

    model = Fixed()
    kill(model, 0.5)
    report = tb.shrink(model, (torch.randn(2, 1, 4, 4),)).report
    reasons = {row.name: row.reason for row in report.rows}
    assert "roll" in reasons["conv"]
    assert "LayerNorm 'norm'" in reasons["a"]
    assert reasons["b"] == ""
    assert all(text in str(report) for text in ("conv (Conv2d)", "LayerNorm", "parameters"))


def test_a_network_that_cannot_be_followed_is_left() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else self.b(-self.a(x))

    model = Branch()
    kill(model, 0.9)
    small = tb.shrink(model, (torch.randn(2, 3),))
    assert small.report.parameters[0] == small.report.parameters[1]
    assert any("torch.fx" in note for note in small.report.notes)
    assert all(row.reason for row in small.report.rows)


def test_flags_dtypes_and_frozen_parameters_stay() -> None:
    torch.manual_seed(0)
    model = mlp().double()
    kill(model, 0.5)
    model[1].weight.requires_grad = False
    model.eval()
    model[4].train()
    small = tb.shrink(model, (torch.randn(6, 3, 4, 4, dtype=torch.float64),)).model
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    assert not small[1].weight.requires_grad
    assert small[3].weight.requires_grad
    assert small[1].weight.dtype == torch.float64


def test_shrinking_again_changes_nothing() -> None:
    for name in ("vgg", "resnet18", "block", "mobilenet"):
        torch.manual_seed(1)
        model = lived(NETWORKS[name][0]())
        kill(model, 0.7)
        once = tb.shrink(model, (example(name),))
        again = tb.shrink(once.model, (example(name),))
        assert again.report.parameters[0] == again.report.parameters[1] == once.report.parameters[1], name


@pytest.mark.parametrize("what", ["no tensors", "a stranger", "empty"])
def test_bad_inputs(what: str) -> None:
    model = nn.Linear(3, 2)
    if what == "no tensors":
        with pytest.raises(TypeError, match="example_inputs"):
            tb.shrink(model, ("x",))  # type: ignore[arg-type]
    elif what == "empty":
        with pytest.raises(TypeError, match="example_inputs"):
            tb.shrink(model, ())
    else:
        stranger = torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1)
        with pytest.raises(ValueError, match="optimizer"):
            tb.shrink(model, (torch.randn(2, 3),), stranger)


# ---- the optimizer


def trained(kind: Any, regularizer: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(8 * 16, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 5),
    )  # fmt: skip
    groups = []
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            name = "rows" if isinstance(layer, nn.Linear) else "filters"
            tb.sparse_init_(layer, 0.05 if regularizer == "l1" else 0.4, None if regularizer == "l1" else name)
            reg = {"l1": tb.L1(), "group": tb.GroupL1(name), "both": tb.SparseGroupL1(name, 0.3)}[regularizer]
            groups.append({"params": [layer.weight], "regularizer": reg, "lam": 0.02})
    weights = {id(p) for group in groups for p in group["params"]}
    model.double()
    if kind in (tb.LinBreg, tb.AdaBreg):
        rest = {"params": [p for p in model.parameters() if id(p) not in weights]}
        optimizer = kind([*groups, rest], lr=1e-2)
    else:
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=1e-3, **options)
    x, y = torch.randn(16, 2, 8, 8, dtype=torch.float64), torch.randint(5, (16,))
    for _ in range(5):
        step(model, optimizer, x, y)
    return model, optimizer, x, y


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("regularizer", ["l1", "group", "both"])
@pytest.mark.parametrize("kind", [tb.LinBreg, tb.AdaBreg, torch.optim.SGD, torch.optim.Adam])
def test_the_next_step_gives_the_same_weights(kind: Any, regularizer: str) -> None:
    model, optimizer, x, y = trained(kind, regularizer, 0)
    if kind in (torch.optim.SGD, torch.optim.Adam):
        for layer in model:
            if isinstance(layer, nn.Linear) and layer.out_features > 5:
                layer.weight.data[::2] = 0
    small = tb.shrink(model, (x,), optimizer)
    assert small.report.parameters[1] < small.report.parameters[0]
    folded = [part.small.detach() - part.restrict(part.full) for part in small.parts]
    losses = step(model, optimizer, x, y), step(small.model, small.optimizer, x, y)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    # A group's norm also holds entries that were cut off, which would move on: where their input is a constant, and by
    # the momentum of AdaBreg.
    exact = regularizer == "l1" or kind in (torch.optim.SGD, torch.optim.Adam)
    bound = 1e-9 if exact else 1e-5 if kind is tb.LinBreg else 5e-3
    for part, before in zip(small.parts, folded, strict=True):
        assert torch.allclose(part.small.detach() - part.restrict(part.full), before, atol=bound)
    untouched = [p for p in model.parameters() if not any(part.full is p for part in small.parts)]
    assert len(untouched) + len({id(part.full) for part in small.parts}) == len(list(model.parameters()))


def test_training_goes_on_and_down() -> None:
    model, optimizer, x, y = trained(tb.AdaBreg, "group", 1)
    small = tb.shrink(model, (x,), optimizer)
    losses = [step(small.model, small.optimizer, x, y) for _ in range(30)]
    assert losses[-1] < losses[0]
    state = small.optimizer.state_dict()
    small.optimizer.load_state_dict(state)  # plain values and tensors


def test_constants_that_differ_in_training_stay() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.data[:3] = 0
    model[1].running_mean.fill_(-0.7)  # not yet what the dead units emit
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(5, 4)
    with_state, without = tb.shrink(model, (x,), optimizer), tb.shrink(model, (x,))
    assert without.model[0].out_features == 3
    assert with_state.model[0].out_features == 6
    assert "training" in with_state.report.rows[0].reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "unet", "encoder", "attends"])
def test_on_a_gpu(name: str) -> None:
    torch.manual_seed(0)
    model, x = lived(NETWORKS[name][0]()).cuda(), example(name).cuda()
    kill(model, 0.7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for small in (tb.shrink(model, (x,)), tb.shrink(model, (x,), optimizer)):
        assert small.report.parameters[1] < small.report.parameters[0]
        assert all(p.is_cuda for p in small.model.parameters())
        assert difference(model, small.model, x) < 1e-5
