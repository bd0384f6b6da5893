"""Numbers that are not finite end a run, and are never saved."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..distributed import local
from .errors import RunError
from .ranks import Processes


def check_losses(losses: Tensor, before: int, checkpoint: Path | None) -> None:
    """RunError that names the first step at which a loss was not finite; there were `before` steps before these."""
    wrong = (~losses.isfinite()).nonzero()
    if len(wrong):
        i = int(wrong[0])
        raise not_finite(f"The loss became {losses[i].item()}", before + i + 1, checkpoint)


def check_weights(model: nn.Module, step: int, checkpoint: Path | None, ranks: Processes) -> None:
    """RunError where a weight is not finite on some rank after `step` steps."""
    good = torch.stack([local(p).isfinite().all() for p in model.parameters()]).all()
    if any(ranks.any(not good)):
        raise not_finite("A weight became infinite or nan", step, checkpoint)


def not_finite(what: str, step: int, checkpoint: Path | None) -> RunError:
    """The sentence for it; `checkpoint`: the last good one."""
    saved = f"the last good checkpoint is {checkpoint}" if checkpoint is not None else "nothing was saved yet"
    return RunError(f"{what} at step {step}; {saved}. A smaller --lr may help.")
