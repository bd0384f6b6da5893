"""Shrinking networks that are written with functions: what lies in one memory, broadcasting, sizes, shared layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import torch_bregman as tb


class Between(nn.Module):
    """Two convolutions with something between them; half of the filters of the first are dead."""

    def __init__(self, between: Callable[[Tensor], Any], bias: float = 0.5) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        self.between = between
        with torch.no_grad():
            self.a.weight[:4] = 0
            self.norm.bias.fill_(bias)
            self.b.weight[0, 4:] = 0  # reads dead filters alone

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.norm(self.a(x)))).relu()


def plus_view(x: Tensor) -> Tensor:
    x.flatten(1).add_(1)
    return x


def half(x: Tensor) -> Tensor:
    x[:, :, 0].mul_(0)
    return x


def statement(x: Tensor) -> Tensor:
    x.add_(1).relu_()
    return x


def earlier(x: Tensor) -> Tensor:
    y = x.relu()
    x.mul_(3)
    return x + y


def same(x: Tensor) -> Tensor:
    y = +x
    y.add_(1)
    return x


def dropped(x: Tensor) -> Tensor:
    y = F.dropout(x, 0.5, training=False)
    F.relu(y, True)
    return x


def identical(x: Tensor) -> Tensor:
    y = x.detach()
    y += 1
    return x * y


def columns(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1], -1).view(x.shape)


def sizes(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h * w).transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2)


def squeeze(x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    return x * torch.sigmoid(x.mean((2, 3)).view(b, c, 1, 1))


def other_count(x: Tensor) -> Tensor:
    return x / x.shape[1]


def everywhere(x: Tensor) -> Tensor:
    return x * x.mean(1, keepdim=True)


#: what lies between, and how many of the filters stay where the dead ones emit 1/2, and where they emit 0
BETWEEN: dict[str, tuple[Callable[[Tensor], Any], int, int]] = {
    "a view is written to": (plus_view, 8, 8),
    "a part is written to": (half, 8, 8),
    "statements": (statement, 4, 4),
    "written to after it was read": (earlier, 4, 4),
    "another name": (same, 4, 4),
    "dropout that drops nothing": (dropped, 4, 4),
    "two names": (identical, 4, 4),
    "its own shape": (columns, 8, 8),
    "sizes": (sizes, 4, 4),
    "squeeze and excite": (squeeze, 4, 4),
    "the number of channels": (other_count, 8, 8),
    "something that all channels make": (everywhere, 8, 8),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_two_layers(name: str) -> None:
    between, *expected = BETWEEN[name]
    for bias, left in zip((0.5, 0.0), expected, strict=True):
        torch.manual_seed(0)
        model = Between(between, bias).eval()
        small = tb.shrink(model, (torch.randn(2, 3, 5, 5),))
        assert small.model.get_submodule("a").out_channels == left
        assert small.report.difference < 1e-6


# ---- layers that are written as functions


class Same(nn.Conv2d):
    """As timm's Conv2dSame: the padding is a function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, [1, 1, 1, 1]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, self.momentum, self.eps)
        return x.relu_()


class Grouped(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class Own(nn.Module):
    """A Linear with other names, a scale per output and a shift per position."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(outputs, inputs))
        self.scale, self.shift = nn.Parameter(torch.randn(outputs)), nn.Parameter(torch.randn(1, 25, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix) * self.scale + self.shift


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = Same(3, 8, 3, bias=False), NormAct(8)
        self.depth, self.group = Same(8, 8, 3, groups=8), Grouped(4, 8)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.own, self.out = Own(8, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.depth(self.norm(self.a(x)))) * self.scale
        return self.out(self.own(x.flatten(2).transpose(1, 2)))


def functions() -> Functions:
    """Filters 0 to 3 and 6 of `a`, and units 0 to 4 of `own`, are dead; groups are (0, 1), (2, 3), ...

    Filter 6 lives with 7, and one of the first two groups has to carry the constants of the other: `own` has no bias.
    """
    torch.manual_seed(0)
    model = Functions().eval()
    with torch.no_grad():
        model.a.weight[[0, 1, 2, 3, 6]] = 0
        model.norm.bias[6] = 0.5
        model.own.matrix[:5] = 0
        model.own.shift[:, :, :5] = model.own.shift[:, :1, :5]
    return model


def test_layers_that_are_written_as_functions() -> None:
    model = functions()
    small = tb.shrink(model, (torch.randn(2, 3, 5, 5),))
    net: Any = small.model
    assert type(net) is Functions
    assert small.report.difference < 1e-6
    assert (net.a.out_channels, net.norm.num_features, len(net.norm.running_mean)) == (6, 6, 6)
    assert (net.depth.in_channels, net.depth.groups, net.group.num_groups, net.group.num_channels) == (6, 6, 3, 6)
    assert (net.scale.shape, net.own.matrix.shape, net.own.shift.shape) == ((6, 1, 1), (5, 6), (1, 25, 5))
    assert net.out.in_features == 5
    rows = {row.name: row for row in small.report.rows}
    assert (rows["a"].kind, rows["a"].before, rows["a"].after) == ("Same", (8, 3), (6, 3))


def test_an_optimizer_goes_on_with_functions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Same(3, 8, 3, bias=False), NormAct(8), nn.Flatten(), nn.Linear(200, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)

    def step(network: nn.Module, following: Any) -> None:
        following.zero_grad()
        network(x).square().mean().backward()
        following.step()

    for _ in range(3):
        step(model, optimizer)
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[1].running_mean[:4] = 0
    small = tb.shrink(model, (x,), optimizer)
    net: Any = small.model
    assert (net[0].out_channels, net[1].num_features, net[3].in_features) == (4, 4, 100)
    step(model, optimizer)
    step(net, small.optimizer)
    assert torch.allclose(model[3].weight.view(4, 8, 25)[:, 4:].flatten(1), net[3].weight)
    assert torch.allclose(model[0].weight[4:], net[0].weight)


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.weight.T


def test_what_subclasses_stay_and_why() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Twice(4, 4), nn.Linear(4, 2))
    model[1].weight.data[:3] = 0
    (_, row, _) = tb.shrink(model, (torch.randn(2, 3),)).report.rows
    assert (row.kind, row.before, row.after, row.kept) == ("Twice", (4, 4), (4, 4), 3)
    assert "is a Twice" in row.reason


def test_the_result_prints_as_its_report() -> None:
    small = tb.shrink(nn.Sequential(nn.Linear(300, 4), nn.Linear(4, 2)), (torch.randn(2, 300),))
    assert str(small) == repr(small) == str(small.report)
    assert len(repr(small)) < 500


def test_what_cannot_be_copied_is_said() -> None:
    x = torch.randn(3, 8)
    pruned = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    prune.ln_structured(pruned[0], "weight", 0.5, n=2, dim=0)
    with pytest.raises(ValueError, match=r"`model`: 0\.weight is computed .*\.prune\.remove"):
        tb.shrink(pruned, (x,))
    remembers: Any = nn.Sequential(nn.Linear(8, 8))
    remembers[0].seen = [remembers(x)]
    with pytest.raises(ValueError, match=r"`model`: 0\.seen holds a tensor that was computed"):
        tb.shrink(remembers, (x,))


def by_width(m: Any, x: Tensor) -> Tensor:
    return m.out(m.up(x).relu() * m.up.out_features**-0.5)


def by_count(m: Any, x: Tensor) -> Tensor:
    return m.out(m.up(x).relu()) / m.out.in_features


def with_assert(m: Any, x: Tensor) -> Tensor:
    assert m.up.out_features == 8
    return m.out(m.up(x).relu())


@pytest.mark.parametrize("forward", [by_width, by_count, with_assert])
def test_code_that_computes_with_sizes_becomes_what_was_traced(forward: Callable[[Any, Tensor], Tensor]) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.out = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    torch.manual_seed(0)
    model = Sized()
    model.up.weight.data[:4] = 0
    small = tb.shrink(model, (torch.randn(5, 3),))
    assert isinstance(small.model, torch.fx.GraphModule)
    assert small.model.up.out_features == 4
    assert any("computes with the sizes" in note for note in small.report.notes)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        tb.shrink(model, (torch.randn(5, 3),), torch.optim.SGD(model.parameters(), lr=0.1))


class Conditional(nn.Module):
    """As a padding that depends on the size of the image, and a forward that looks at what else it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 2), nn.Conv2d(8, 2, 1)
        self.a.weight.data[:4] = 0

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, [0, 1, 0, 0])
        x = self.a(x).relu()
        if x.shape[1] < 4:
            x = x.flip(1)
        return self.b(x if scale is None else x * scale)


def test_conditions_on_sizes_are_followed() -> None:
    torch.manual_seed(0)
    model = Conditional()
    small = tb.shrink(model, (torch.randn(2, 3, 5, 5),))
    assert small.model.get_submodule("a").out_channels == 8  # their number is looked at

    class Fewer(Conditional):
        def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
            return self.b(self.a(F.pad(x, [0, 1, 0, 0]) if x.shape[-1] % 2 else x).relu())

    small = tb.shrink(Fewer(), (torch.randn(2, 3, 5, 5),))
    assert small.model.get_submodule("a").out_channels == 4


@pytest.mark.parametrize("condition", [lambda x: x.shape[0] > 2, lambda x: x.sum() > 0])
def test_conditions_on_samples_are_not(condition: Callable[[Tensor], Any]) -> None:
    class Samples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) if condition(x) else -self.a(x))

    small = tb.shrink(Samples(), (torch.randn(2, 3),))
    assert "control flow" in small.report.notes[0]


def test_operators_with_an_underscore_write_nothing() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
            self.a.weight.data[:4] = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            inside = (x > -1) & (x < 1)
            return self.b(x * inside)

    small = tb.shrink(Masks(), (torch.randn(2, 3),))
    assert small.report.difference < 1e-6
