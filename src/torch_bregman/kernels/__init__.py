"""The inner loops, written in Numba: what they compute stands in readable PyTorch elsewhere and is tested against it.

They need the extra `fast`. Without it everything works, slower.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

BAND = 128  # rows of a transposed sparse matrix whose values are fetched together
LINE_BYTES = 64  # a cache line
DTYPES = {torch.float32: "float32", torch.float64: "float64"}  # what the kernels compute in


@functools.cache
def available() -> bool:
    """Whether Numba is installed. It is imported only when a kernel is wanted: that takes half a second."""
    return importlib.util.find_spec("numba") is not None


def require(what: str) -> None:
    """ImportError naming the extra, unless Numba is there."""
    if not available():
        raise ImportError(f"{what} needs Numba: pip install 'torch-bregman[fast]'.")


def compiled_before(name: str) -> bool:
    """Whether Numba's file cache holds something of the module `name` of this folder."""
    return any((Path(__file__).parent / "__pycache__").glob(f"{name}.*.nbi"))
