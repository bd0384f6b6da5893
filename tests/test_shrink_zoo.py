"""Random networks of functions with dead filters: whatever shrink makes of them computes the same."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bregman as tb

SIZE = 5


class Step(nn.Module):
    """One operation with tensors of its own, for images of `n` channels."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = self.out = n
        self.scale, self.shift = nn.Parameter(torch.randn(n, 1, 1)), nn.Parameter(torch.randn(n))
        self.build(n)

    def build(self, n: int) -> None:
        pass

    def weight(self, *shape: int) -> nn.Parameter:
        """Half of its units are dead, on average."""
        weight = nn.Parameter(torch.randn(shape))
        weight.data[torch.rand(len(weight)) < 0.5] = 0
        return weight


class FunctionalConv(Step):
    def build(self, n: int) -> None:
        self.out = random.choice([4, 6, 8])
        self.w, self.b = self.weight(self.out, n, 3, 3), nn.Parameter(torch.randn(self.out))
        self.padding = random.choice([0, 1])
        self.with_bias = random.choice([True, False])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w, self.b if self.with_bias else None, padding=self.padding)
        return F.pad(x, [1, 1, 1, 1]) if self.padding == 0 else x


class ModuleConv(Step):
    def build(self, n: int) -> None:
        self.out = random.choice([4, 6, 8])
        self.conv = nn.Conv2d(n, self.out, 1)
        self.conv.weight = self.weight(self.out, n, 1, 1)
        self.norm = random.choice([nn.Identity(), nn.BatchNorm2d(self.out)])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Depthwise(Step):
    def build(self, n: int) -> None:
        self.w = self.weight(n, 1, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.shift, padding=1, groups=self.n)


class Tied(Step):
    """A layer that is called twice."""

    def build(self, n: int) -> None:
        self.conv = nn.Conv2d(n, n, 1)
        self.conv.weight = self.weight(n, n, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x).relu_())


class WeightRead(Step):
    """A layer whose weight has another use."""

    def build(self, n: int) -> None:
        self.conv = nn.Conv2d(n, n, 1)
        self.conv.weight = self.weight(n, n, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(x), self.conv.weight)


class FunctionalNorm(Step):
    def build(self, n: int) -> None:
        self.register_buffer("mean", torch.randn(n))
        self.register_buffer("variance", torch.rand(n) + 0.5)
        self.mean: Tensor
        self.variance: Tensor
        self.w = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.variance, self.w, self.shift, self.training)


class Einsum(Step):
    def build(self, n: int) -> None:
        self.w = self.weight(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.w)


class Function(Step):
    def __init__(self, n: int, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(n)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Wider(Function):
    """A function that doubles the channels."""

    def build(self, n: int) -> None:
        self.out = 2 * n


def in_place(m: Any, x: Tensor) -> Tensor:
    x.add_(1).relu_()
    return x


def in_place_of_a_view(m: Any, x: Tensor) -> Tensor:
    y = x.view(x.size(0), x.size(1), -1)
    y.mul_(2).sub_(1)
    return x


def in_place_of_a_part(m: Any, x: Tensor) -> Tensor:
    x[:, 1:3].add_(1)
    return x * 2


def in_place_after_a_read(m: Any, x: Tensor) -> Tensor:
    y = x.sigmoid()
    x += m.shift[:, None, None]
    return y * x


def in_place_under_another_name(m: Any, x: Tensor) -> Tensor:
    y = x.detach() if not m.training else x
    y *= 2
    return x + y


def to_an_argument(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y.copy_(x)
    return F.relu(y, True) + x


def halves(m: Any, x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.cat([b.relu(), a], 1)


def uneven(m: Any, x: Tensor) -> Tensor:
    a, b = torch.split(x, [1, m.n - 1], 1)
    return torch.cat([a, b.tanh()], 1)


def gates(m: Any, x: Tensor) -> Tensor:
    b, c, _, _ = x.shape
    return x * torch.sigmoid(x.mean((2, 3)) * m.shift).view(b, c, 1, 1)


def columns(m: Any, x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2).reshape(x.shape[0], SIZE, SIZE, x.shape[1]).permute(0, 3, 1, 2)


def place(m: Any, x: Tensor) -> Tensor:
    return x * x.amax(1, keepdim=True).sigmoid()


FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in place": in_place,
    "in place, a view": in_place_of_a_view,
    "in place, a part": in_place_of_a_part,
    "in place, after a read": in_place_after_a_read,
    "in place, another name": in_place_under_another_name,
    "to an argument": to_an_argument,
    "chunk": halves,
    "split": uneven,
    "gates": gates,
    "gate of places": place,
    "scale": lambda m, x: x * m.scale,
    "scale of a view": lambda m, x: x.mul(m.shift.reshape(1, -1, 1, 1)),
    "shift": lambda m, x: x + m.shift[:, None, None],
    "addcmul": lambda m, x: torch.addcmul(m.scale, x, m.scale, value=0.5),
    "expand": lambda m, x: x + m.scale.expand_as(x),
    "layer norm": lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (m.n,), m.shift).permute(0, 3, 1, 2),
    "group norm": lambda m, x: F.group_norm(x, 2, m.shift, m.shift),
    "where": lambda m, x: torch.where(x > 0, x, m.scale),
    "stack": lambda m, x: torch.stack([x, x.relu()]).sum(0),
    "flip": lambda m, x: x.flip(1),
    "part": lambda m, x: torch.cat([x[:, 1:], x[:, :1]], 1),
    "all": lambda m, x: x[:, : m.n],
    "residual": lambda m, x: x + F.leaky_relu(x) + x.mean((2, 3), keepdim=True),
    "over channels": lambda m, x: x - x.mean(1, keepdim=True),
    "sizes": lambda m, x: x / x.shape[1],
    "columns": columns,
    "dropout": lambda m, x: F.dropout(x, 0.5, False).add_(1),
    "plus": lambda m, x: (+x).clamp_(-1, 1) + x,
    "pool": lambda m, x: F.max_pool2d(x, 3, 1, 1) - F.avg_pool2d(x, 3, 1, 1),
}  # fmt: skip
LAYERS = [FunctionalConv, ModuleConv] * 4 + [Depthwise, FunctionalNorm] * 2 + [Tied, WeightRead, Einsum]


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    random.seed(seed)
    steps: list[nn.Module] = [FunctionalConv(3)]
    n: Any = steps[0].out
    for _ in range(random.randint(3, 5)):
        step: Any = random.choice(LAYERS)(n)
        if random.random() < 0.8:
            steps.append(step)
            n = step.out
        step = Function(n, random.choice(list(FUNCTIONS.values())))
        if random.random() < 0.1 and n < 10:
            step = Wider(n, lambda m, x: torch.cat([x, x.neg()], 1))
        steps.append(step)
        n = step.out
    return nn.Sequential(*steps, nn.Flatten(), nn.Linear(n * SIZE * SIZE, 3)).double()


def difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y, z = (copy.deepcopy(m)(x.clone()) for m in (a, b))
    return float((y - z).abs().max() / y.abs().max().clamp_min(1e-30))


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_the_same_outputs(first: int) -> None:
    smaller = 0
    for seed in range(first, first + 10):
        model = network(seed)
        x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
        small = tb.shrink(model, (x,))
        smaller += small.report.parameters[1] < small.report.parameters[0]
        assert difference(model.eval(), small.model.eval(), torch.randn_like(x)) < 1e-6, seed
    assert smaller > 4


@pytest.mark.parametrize("first", [0, 10, 190])
def test_the_same_outputs_in_training(first: int) -> None:
    for seed in range(first, first + 10):
        model = network(seed).train()
        x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
        small = tb.shrink(model, (x,), torch.optim.SGD(model.parameters(), lr=0.1))
        assert difference(model, small.model, torch.randn_like(x)) < 1e-6, seed
