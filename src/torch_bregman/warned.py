"""A warning that points at the user's line, past the frames of this library and of torch."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (torch.__file__, __file__))


def warn(sentence: str) -> None:
    """Warn once per line of the user's code."""
    frame, levels = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, levels = frame.f_back, levels + 1
    warnings.warn(sentence, stacklevel=levels)
