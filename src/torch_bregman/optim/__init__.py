"""The optimizers: one file each, the equations readable in it."""

from .adabreg import AdaBreg
from .base import BregmanOptimizer
from .linbreg import LinBreg
from .proxsgd import ProxSGD
from .regularized import RegularizedOptimizer

__all__ = ["AdaBreg", "BregmanOptimizer", "LinBreg", "ProxSGD", "RegularizedOptimizer"]
