"""Shrinking networks that are written with functions: what lies in one memory, broadcasting, sizes, shared layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
