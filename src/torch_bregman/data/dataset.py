"""What a loaded data set is: three splits and the facts a report needs beside them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their labels.

    `x`: floating point, normalised, [N, C, H, W] for images or [N, F] for arrays.
    `y`: int64 [N], positions in `Dataset.classes`.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Split:
        """The same split on `device`, its samples in `dtype`."""
        return Split(self.x.to(device, dtype), self.y.to(device))


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

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """The same data set on `device`, its samples in `dtype`, float32 where that is None."""
        train, validation, test = (split.to(device, dtype) for split in (self.train, self.validation, self.test))
        return replace(self, train=train, validation=validation, test=test)

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """`mean` and `std` beside the data, in a shape that fits a batch of samples; made once, not per batch."""
        shape, x = (-1, *[1] * (len(self.shape) - 1)), self.train.x
        mean, std = (torch.tensor(values, device=x.device, dtype=x.dtype) for values in (self.mean, self.std))
        return mean.view(shape), std.view(shape)

    def raw(self, x: Tensor) -> Tensor:
        """The samples `x` as they were before normalisation: images as pixels in [0, 1]."""
        mean, std = self.moments
        return x * std + mean
