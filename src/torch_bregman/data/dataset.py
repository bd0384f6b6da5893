"""What a loaded data set is: three splits and the facts a report needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their labels.

    `x`: float32, normalised, [N, C, H, W] for images or [N, F] for arrays.
    `y`: int64 [N], positions in `Dataset.classes`.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.x.to(device), self.y.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set split in three, normalised with the mean and standard deviation of its training split.

    `shape`: of one sample. `mean`, `std`: one number per channel (per feature for arrays), before normalisation, where
    uint8 data count in units of 255. `note`: empty, or what must be said beside an accuracy measured on this copy.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str = ""

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set on `device`."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """`mean` and `std` beside the data, in a shape that fits a batch of samples; made once, not per batch."""
        shape, device = (-1, *[1] * (len(self.shape) - 1)), self.train.x.device
        return torch.tensor(self.mean, device=device).view(shape), torch.tensor(self.std, device=device).view(shape)

    def raw(self, x: Tensor) -> Tensor:
        """The samples `x` as they were before normalisation: images as pixels in [0, 1]."""
        mean, std = self.moments
        return x * std + mean
