"""ResNet-18 for small images: a 3×3 stem without pooling, 11.17 M weights and biases on CIFAR-10."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class Block(nn.Module):
    """Two 3×3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(out)) + self.shortcut(x)).relu()


class ResNet(nn.Module):
    """[He et al., 2016] with two blocks per stage; `width` filters in the first stage, doubled in each next one."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(pairwise(sizes)):
            blocks += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))))


def resnet18(shape: tuple[int, ...], classes: int) -> nn.Module:
    """ResNet-18 with a 3×3 stem for images of `shape` [channels, height, width]."""
    if len(shape) != 3:
        raise ValueError(f"Model 'resnet18' needs images [channels, height, width]; the samples have shape {shape}.")
    return ResNet(shape[0], classes)


def narrow_resnet(shape: tuple[int, ...], classes: int) -> nn.Module:
    """A ResNet-18 with 8 filters in its first stage instead of 64, for a CPU."""
    return ResNet(shape[0], classes, width=8)
