"""timm's networks with dead units: what a count by hand says can go is gone, and the outputs are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision_stub
from torch import Tensor, nn

import torch_bregman as tb

pytestmark = pytest.mark.abroad
try:
    torchvision_stub.install()
    import timm
except ImportError:
    pytest.skip("needs timm", allow_module_level=True)

CLASSES = 10
NORMS = nn.modules.batchnorm._NormBase


def build(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options).eval()


@torch.no_grad()
def kill_half(model: nn.Module) -> nn.Module:
    """The first half of the filters of every convolution, so of every sum as well."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight[: len(module.weight) // 2] = 0
    return model


@torch.no_grad()
def lived(model: nn.Module) -> nn.Module:
    """Norms as after training: dead filters emit numbers of their own."""
    for module in model.modules():
        if isinstance(module, NORMS):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    return model


def half(model: nn.Module) -> int:
    """By hand: every layer has half of its outputs and, but for the image, half of its inputs; the classes stay."""
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs, *kernel = module.weight.shape
            inputs = inputs - inputs // 2 if inputs not in (1, 3) else inputs
            count += (outputs - outputs // 2) * (inputs * kernel[0] * kernel[1] + (module.bias is not None))
        elif isinstance(module, NORMS):
            count += 2 * (module.num_features - module.num_features // 2)
        elif isinstance(module, nn.Linear):
            count += module.out_features * (module.in_features // 2 + 1)
    return count


def shrunk(model: nn.Module, x: Tensor) -> Any:
    small = tb.shrink(model, (x,))
    y = torch.randn_like(x)
    with torch.no_grad():
        before, after = model(y), small.model(y)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
    return small


@pytest.mark.parametrize(
    "name",
    [
        "resnet18", "resnetv2_18", "seresnet18", "densenet121", "mobilenetv2_050", "mobilenetv3_small_100",
        "mnasnet_050", "efficientnet_lite0", "tf_efficientnet_lite0", "repvit_m0_9",
    ],
)  # fmt: skip
def test_half_of_the_filters(name: str) -> None:
    model = kill_half(build(name))
    small = shrunk(model, torch.randn(1, 3, 64, 64))
    assert small.report.parameters[1] == pytest.approx(half(model), rel=0.03)
    assert type(small.model) is type(model)


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "mobilenetv2_050", "mnasnet_050", "efficientnet_lite0"])
def test_dead_filters_that_emit_numbers(name: str) -> None:
    """Some layers keep a channel that carries the others through a zero padding."""
    model = kill_half(lived(build(name)))
    small = shrunk(model, torch.randn(1, 3, 64, 64))
    assert half(model) * 0.97 < small.report.parameters[1] < half(model) * 1.1


@pytest.mark.parametrize("name", ["seresnet18", "mobilenetv3_small_100", "tf_efficientnet_lite0", "regnety_002"])
def test_numbers_behind_gates_and_paddings_stay(name: str) -> None:
    """What a gate makes of a constant differs from sample to sample, and a padding by a function from the border on."""
    shrunk(kill_half(lived(build(name))), torch.randn(1, 3, 64, 64))


def test_resnet18_is_a_quarter() -> None:
    small = shrunk(kill_half(build("resnet18")), torch.randn(1, 3, 64, 64))
    assert small.report.parameters == (11_181_642, 2_801_450)


def test_heads_and_units_of_a_transformer() -> None:
    """One of three heads, and half of the units, of every block; norms and sums need all channels."""
    model = build("vit_tiny_patch16_224", img_size=32)
    width, head, hidden, depth = 192, 64, 768, 12
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.view(3, 3, head, width)[2, 0] = 0  # the values of the first head
            block.attn.qkv.bias.normal_()
            block.mlp.fc1.weight[: hidden // 2] = 0
            block.mlp.fc1.bias.normal_()
    small = shrunk(model, torch.randn(2, 3, 32, 32))
    attention = 3 * 2 * head * (width + 1) + (2 * head + 1) * width
    units = hidden // 2 * (width + 1) + (hidden // 2 + 1) * width
    around = (3 * 16 * 16 + 1) * width + (1 + 5) * width + 2 * width + (width + 1) * CLASSES
    assert small.report.parameters[1] == depth * (attention + units + 4 * width) + around


def test_units_between_norms() -> None:
    """Of a ConvNeXt the units of the MLPs go; its norms and sums need all channels."""
    model = kill_half(build("convnext_atto", ls_init_value=0.5))
    small = shrunk(model, torch.randn(1, 3, 64, 64))
    lost = sum(
        depth * 2 * width * (2 * width + 1) for depth, width in zip((2, 2, 6, 2), (40, 80, 160, 320), strict=True)
    )
    before, after = small.report.parameters
    assert before - after == lost


@torch.no_grad()
def test_a_layer_scale_is_cut_with_its_channels() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = timm.layers.BatchNormAct2d(8)
            self.a, self.b = timm.layers.Conv2dSame(3, 8, 3), nn.Conv2d(8, 2, 1)
            self.scale = timm.layers.LayerScale2d(8, 0.1)
            self.pool = timm.layers.SelectAdaptivePool2d(pool_type="avg", flatten=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.b(self.scale(self.norm(self.a(x)))))

    model = Scaled().eval()
    model.a.weight[:4] = 0
    model.norm.bias.normal_()
    small: Any = shrunk(model, torch.randn(2, 3, 9, 9)).model
    assert (small.a.out_channels, small.norm.num_features, len(small.scale.gamma), small.b.in_channels) == (4, 4, 4, 4)
