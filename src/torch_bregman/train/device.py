"""Where a run computes, and with how many threads."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def pick_device(name: str) -> torch.device:
    """The device called `name`, "auto" for a GPU where there is one; ValueError where it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Invalid `device`: {name!r}; it cannot be used here ({str(error).splitlines()[0]})."
        ) from None
    return torch.device(name)


def pick_threads(model: nn.Module, x: Tensor, processes: int = 1) -> int:
    """All cores, or 1 for a network so small that threads cost more than they save: under a GFLOP per forward pass.

    `processes` of this machine share the cores. A rule and not a timing, for the number of threads decides about the
    last bits of a run.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(x)
    model.train()
    return 1 if counter.get_total_flops() < 1e9 else max((os.cpu_count() or 1) // processes, 1)
