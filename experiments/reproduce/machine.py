"""What figures depend on beside the recipe: versions, machine, and the memory that was used."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

from torch_bregman import __version__
from torch_bregman.train.device import pick_device
from torch_bregman.train.recipe import Recipe


def describe_machine() -> dict[str, Any]:
    """What figures depend on beside the recipe."""
    machine = {
        "torch-bregman": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def peak_memory(recipe: Recipe) -> int | None:
    """The most memory of this process (see `page.MEMORY`) in bytes; None where the system does not say."""
    device = pick_device(recipe.device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
