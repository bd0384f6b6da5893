"""The networks of the experiments. Each is a function (shape of a sample, number of classes) → nn.Module.

Add one: write such a function, put it into `MODELS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..choices import called, choose
from .resnet import resnet18
from .shapes import Shape, image_shape
from .skip import densenet, skipencoder

Build = Callable[[Shape, int], nn.Module]


def mlp(shape: Shape, classes: int, hidden: tuple[int, ...] = (200, 80)) -> nn.Module:
    """Fully connected with ReLU: 784-200-80-10 on MNIST, the paper's."""
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(shape)
    for size in hidden:
        layers += [nn.Linear(width, size), nn.ReLU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, classes))


def convnet(shape: Shape, classes: int) -> nn.Module:
    """The paper's: two 5×5 convolutions of 64 filters, each with pooling, then 1024-128-10 on 28×28 images."""
    channels, height, width = image_shape("convnet", shape)
    # On images too small for two unpadded 5×5 convolutions the borders are padded.
    padding = 0 if min(height, width) >= 16 else 2
    for _ in range(2):
        height, width = (height - 4 + 2 * padding) // 2, (width - 4 + 2 * padding) // 2
    if min(height, width) < 1:
        raise ValueError(f"Model 'convnet' needs images of at least 4×4 pixels; got {shape}.")
    return nn.Sequential(
        nn.Conv2d(channels, 64, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * height * width, 128), nn.ReLU(), nn.Linear(128, classes),
    )  # fmt: skip


class Autoencoder(nn.Sequential):
    """Six Linear layers as wide as the input: rows that never come alive are neurons that were not needed.

    On images each has a ReLU, the last one too, as in the authors' code: pixels are not negative, and a background that
    is not exactly black costs much of the structural similarity. Arrays end in a Linear layer.
    """

    #: the training loop gives samples with noise and compares with what they were before noise and normalisation
    task = "denoise"

    def __init__(self, shape: Shape) -> None:
        width = math.prod(shape)
        hidden = [layer for _ in range(5) for layer in (nn.Linear(width, width), nn.ReLU())]
        output = [nn.Linear(width, width), nn.ReLU()] if len(shape) == 3 else [nn.Linear(width, width)]
        super().__init__(nn.Flatten(), *hidden, *output, nn.Unflatten(1, shape))


def autoencoder(shape: Shape, classes: int) -> nn.Module:
    """The paper's denoising autoencoder, 784×(6 Linear) on MNIST; `classes` is not used."""
    return Autoencoder(shape)


MODELS: dict[str, Build] = {
    "mlp": mlp, "convnet": convnet, "resnet18": resnet18, "autoencoder": autoencoder, "skipencoder": skipencoder,
    "densenet": densenet,
}  # fmt: skip

#: functions that have moved, as the runs and result files of version 0.1.0 name them → where they are
MOVED = {"torch_bregman.reproduce:narrow_resnet": "torch_bregman.models.resnet:narrow_resnet"}


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """The model called `name`: one of `MODELS`, or "package.module:function" of your own.

    Raises ValueError where there is none, or where it does not fit the samples.
    """
    if ":" not in name:
        return MODELS[choose("model", name, MODELS)](shape, classes)
    model = called("model", MOVED.get(name, name), shape, classes)
    if not isinstance(model, nn.Module):
        raise ValueError(f"Invalid `model`: {name!r} returned {type(model).__name__}; expected a torch.nn.Module.")
    for path, parameter in model.named_parameters():
        if parameter.is_meta or isinstance(parameter, nn.parameter.UninitializedParameter):
            how = "is on the meta device" if parameter.is_meta else "is lazy: give the layer its sizes"
            raise ValueError(f"Invalid `model`: {name!r}; {path} has no values, it {how}.")
    return model
