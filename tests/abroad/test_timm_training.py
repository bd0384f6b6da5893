"""timm's networks from a sparse start: asked is got by a count by hand, and they learn."""

from __future__ import annotations

import pytest
import torch
import torchvision_stub
from torch import nn

import torch_bregman as tb

pytestmark = pytest.mark.abroad
try:
    torchvision_stub.install()
    import timm
    from timm.utils import ModelEmaV3
except ImportError:
    pytest.skip("needs timm", allow_module_level=True)

NAMES = ["resnet18", "mobilenetv3_small_100", "convnext_atto", "vit_tiny_patch16_224", "efficientnet_lite0"]
CLASSES = 4


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=CLASSES, **options)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """By hand: kernels and matrices, but not what a vision transformer adds to its tokens, [1, tokens, width]."""
    return [p for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith(("pos_embed", "cls_token"))]


def alive(model: nn.Module) -> float:
    return sum(int((p != 0).sum()) for p in matrices(model)) / sum(p.numel() for p in matrices(model))


@pytest.mark.parametrize("name", NAMES)
def test_asked_is_got(name):
    model = build(name)
    tb.sparse_init_(model, 0.02, min_inputs=1)
    optimizer = tb.AdaBreg(tb.param_groups(model, tb.L1()), lr=2e-3)
    control = tb.TargetDensity(optimizer, 0.05, total_steps=12)
    average = ModelEmaV3(model, decay=0.5)
    torch.manual_seed(1)
    y = torch.arange(8) % CLASSES
    x = torch.randn(CLASSES, 3, 32, 32)[y] + 0.1 * torch.randn(8, 3, 32, 32)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        control.step()
        average.update(model)
        losses.append(loss.item())
    assert alive(model) == tb.density(model) == control.density == pytest.approx(0.05, rel=1e-5)
    assert min(losses[-3:]) < losses[0]
    assert tb.density(average.module) > 0.05
    tb.prune_(average.module, 0.05)
    assert tb.density(average.module) == alive(average.module) == pytest.approx(0.05, rel=1e-5)
