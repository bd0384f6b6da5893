"""Batches of a split that lies in memory: one gather per batch, no workers, an order that can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torch_bregman.data.dataset import Split

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Iterates over `split` in batches (x, y) of `batch_size`, on the device of the split.

    `generator`: a CPU generator; every epoch draws one `torch.randperm` from it when it starts, so its state at the
    start of an epoch and the number of batches done are all that resuming needs. None: the order of the split.
    `augment`: called as augment(x, generator) with a generator on the device of x; one seed per epoch is drawn from
    `generator` after the order, and batch i uses seed + i, so that skipped batches need no replay.
    `drop_last`: leave out a last batch that is not full. `least`: one of fewer samples joins the batch before it.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        generator: torch.Generator | None = None,
        augment: Augmentation | None = None,
        drop_last: bool = False,
        least: int = 1,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size`: got {batch_size!r}; expected a positive integer.")
        if generator is not None and generator.device.type != "cpu":
            raise ValueError(f"`generator`: got one on {generator.device}; expected a CPU generator.")
        if augment is not None and generator is None:
            raise ValueError("`augment` is random: expected a `generator` beside it, got None.")
        if drop_last and len(split) < batch_size:
            raise ValueError(
                f"`batch_size`: got {batch_size}; expected at most the {len(split)} samples, because of `drop_last`."
            )
        if isinstance(least, bool) or not isinstance(least, int) or not 1 <= least <= batch_size:
            raise ValueError(f"`least`: got {least!r}; expected 1 to {batch_size}, the `batch_size`.")
        self.split, self.batch_size, self.drop_last, self.least = split, batch_size, drop_last, least
        self.generator, self.augment = generator, augment

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        if self.drop_last:
            return full
        return full + (rest >= self.least or (rest > 0 and full == 0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch()

    def epoch(self, skip: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch without its first `skip` batches. The order is drawn by this call, not by the first batch."""
        if not 0 <= skip <= len(self):
            raise ValueError(f"`skip`: got {skip}; expected 0 to {len(self)}, the batches of an epoch.")
        if self.generator is None:
            return self._in_order(skip)
        order = torch.randperm(len(self.split), generator=self.generator).to(self.split.x.device)
        seed = 0 if self.augment is None else int(torch.randint(2**62, (), generator=self.generator))
        return self._in_random_order(skip, order, seed)

    def _place(self, i: int) -> slice:
        """Where the samples of batch `i` are in the order; the last one takes what joins it."""
        joined = i == len(self) - 1 and not self.drop_last
        return slice(i * self.batch_size, len(self.split) if joined else (i + 1) * self.batch_size)

    def _in_order(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(skip, len(self)):
            place = self._place(i)
            yield self.split.x[place], self.split.y[place]  # views: evaluation copies nothing

    def _in_random_order(self, skip: int, order: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator(order.device) if self.augment is not None else None
        for i in range(skip, len(self)):
            index = order[self._place(i)]
            x, y = take(self.split.x, index), take(self.split.y, index)
            if self.augment is not None and generator is not None:
                x = self.augment(x, generator.manual_seed(seed + i))
            yield x, y


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` along the first axis.

    On the CPU by NumPy, in one thread: `index_select` starts all threads for a tenth of a millisecond of copying, and
    where other processes use the cores, too, waiting for these threads was measured to take 8 ms per batch.
    """
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.int64):  # NumPy has no bfloat16
        return torch.from_numpy(x.numpy().take(index.numpy(), axis=0))
    return x.index_select(0, index)
