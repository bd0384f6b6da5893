"""The command line: `torch-bregman train mnist --density 0.05`, and what is done with the network afterwards.

A file per command, which is there once it is imported here.
"""

import sys

try:
    import cyclopts  # noqa: F401
    import rich  # noqa: F401
except ImportError:
    sys.exit("The command line needs its extra: pip install 'torch-bregman[train]'.")

from . import bench, export, report, reproduce, shrink, train  # noqa: F401
from .entry import main

__all__ = ["main"]
