"""The training loop behind the command line.

recipe → what was asked for; training → the run between two steps, with its state; loop → `fit`, from the data to the
last row. start, evaluation, measures, metrics and weights are its parts; ranks → several processes; checkpoints, in one
file (checksummed) or in folders, are where it goes on from.
"""

from .loop import fit
from .recipe import Recipe

__all__ = ["Recipe", "fit"]
