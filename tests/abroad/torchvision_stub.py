"""timm imports torchvision, but what its networks take from it is little: enough of it to import timm without it."""

from __future__ import annotations

import importlib.util
import sys
from enum import Enum
from types import ModuleType
from typing import Any

from torch import nn

#: module → the names that timm takes from it while it is imported
NAMES = {
    "torchvision": (),
    "torchvision.datasets": ("CIFAR10", "CIFAR100", "FashionMNIST", "ImageFolder", "KMNIST", "MNIST"),
    "torchvision.models": (),
    "torchvision.models.feature_extraction": ("create_feature_extractor", "get_graph_node_names"),
    "torchvision.ops": (),
    "torchvision.ops.misc": (),
    "torchvision.transforms": ("Compose", "Normalize", "Resize", "ToTensor"),
    "torchvision.transforms.functional": (),
}


class InterpolationMode(Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class FrozenBatchNorm2d(nn.Module):
    """Only asked for with isinstance."""


class Missing:
    """What the stub does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ImportError("torchvision is not installed; this is a stub that lets timm be imported.")


def install() -> None:
    """Import timm, behind a stub of torchvision where there is none; afterwards there is none again.

    Who looks for torchvision later (Transformers, Lightning) then finds what there is: nothing.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    modules = {name: ModuleType(name) for name in NAMES}
    for name, module in modules.items():
        module.__path__ = []  # type: ignore[attr-defined]  # a package
        for attribute in NAMES[name]:
            setattr(module, attribute, Missing)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        modules[name].InterpolationMode = InterpolationMode  # type: ignore[attr-defined]
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        import timm  # noqa: F401
    finally:
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
