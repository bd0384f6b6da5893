"""The training loop behind the command line."""

from .loop import fit
from .recipe import Recipe

__all__ = ["Recipe", "fit"]
