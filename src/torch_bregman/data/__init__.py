"""The data sets of the experiments and the user's own, as tensors in memory.

    data = load("mnist")                                # or "digits", "fashion-mnist", "cifar10", "my.npz", "my/images"
    for x, y in Batches(data.train, 128, generator=torch.Generator().manual_seed(0)): ...

What goes wrong with data (a wrong name, a missing or broken file) is a `DataError` of one sentence.
"""

from torch_bregman.data.augment import AUGMENTATIONS
from torch_bregman.data.batches import Batches
from torch_bregman.data.catalogue import load, names
from torch_bregman.data.dataset import Dataset, Split
from torch_bregman.data.errors import DataError

__all__ = ["AUGMENTATIONS", "Batches", "DataError", "Dataset", "Split", "load", "names"]
