"""How good a network is: loss, accuracy, and how alike images are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Batches, Split
from .denoising import Denoising
from .ranks import ONE_PROCESS, Processes

EVALUATION_BATCH = 1000


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, denoising: Denoising | None, mixed: Callable[[], Any], layout: dict[str, Any],
    ranks: Processes = ONE_PROCESS, similarity: Callable[[Tensor, Tensor], list[float]] | None = None, images: int = 0,
) -> dict[str, float]:  # fmt: skip
    """val_loss; val_accuracy where there are classes; with `similarity` the mean val_ssim of the first `images`.

    In eval mode, so that norms keep their statistics. With several ranks `images` is rounded up to a batch.
    """
    ranks.share_buffers(model)
    training = model.training
    model.eval()
    loss = torch.zeros((), device=split.x.device)
    correct = torch.zeros((), device=split.x.device)
    alike: list[float] = []
    seen = 0
    generator = torch.Generator(split.x.device).manual_seed(0)  # the same noise in every epoch
    for x, y in Batches(split, EVALUATION_BATCH):
        with mixed():
            if denoising:
                noisy, clean = ranks.part(denoising.noisy(x, generator), denoising.clean(x))
                made, count = model(noisy), ranks.count(len(x))
                loss += F.mse_loss(made, clean) * count
                if similarity is not None and seen < images:
                    room = min(images - seen, count) if ranks.size == 1 else count
                    alike += similarity(made[:room], clean[:room])
                seen += len(x)
            else:
                mine, labels = ranks.part(x, y)
                out = model(mine.contiguous(**layout) if layout else mine)
                if ranks.count(len(x)):
                    loss += F.cross_entropy(out, labels, reduction="sum")
                    correct += (out.argmax(1) == labels).sum()
    model.train(training)
    all_loss, all_correct = ranks.total(loss, correct)
    scores = {"val_loss": all_loss / len(split)}
    if not denoising:
        scores["val_accuracy"] = all_correct / len(split)
    if similarity is not None:
        of_all, number = ranks.total(*torch.tensor([sum(alike), len(alike)], dtype=torch.float64))
        scores["val_ssim"] = of_all / number
    return scores
