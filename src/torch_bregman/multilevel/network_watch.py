"""Which network answers: the model itself, or the compact one that is trained in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .compact import CompactNetwork
from .sequential import WatchedSequential
from .watch import Watch


class NetworkWatch(Watch):
    """The network: remembers what it was called with, and while there is a compact one sends training calls there.

    Attributes:
        inputs: of the largest batch like the last one, in training mode; None if the network cannot be traced with
            them. A short batch says little about what is faster.
        compact: the compact network.
        expected: whether one is to be made before the next call, as a run was loaded in a phase that has one.
        sequential: what watches the network if it is a Sequential.
        on_training: called before every training call.
        on_compact: called before the compact network is used, or, where one is `expected`, made.
    """

    def __init__(
        self,
        module: nn.Module,
        sequential: WatchedSequential | None,
        on_training: Callable[[], None],
        on_compact: Callable[[], None],
    ) -> None:
        super().__init__(module)
        self.sequential, self.on_training, self.on_compact = sequential, on_training, on_compact
        self.inputs: tuple[Tensor, ...] | None = None
        self.compact: CompactNetwork | None = None
        self.expected = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the compact network makes of a training call; None where the network shall compute as ever."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled():
            self.on_training()
        if not self.module.training:
            self.catch_up()
            return self._itself(*args, **kwargs)
        plain = not kwargs and all(type(x) is Tensor for x in args)
        if not plain:
            self.inputs = None
        elif self.inputs is None or not _is_part_of(args, self.inputs):
            self.inputs = tuple(x.detach() for x in args)
        if self.compact is not None or self.expected:
            self.on_compact()
        if self.compact is None:
            return self._itself(*args, **kwargs)
        self.compact.passes += 1
        return self.compact.model.forward(*args, **kwargs)

    def _itself(self, *args: Any, **kwargs: Any) -> Any:
        """A network that is a Sequential has two watches."""
        return None if self.sequential is None or len(args) != 1 or kwargs else self.sequential.forward(*args)

    def catch_up(self) -> None:
        """Bring the running statistics of the network up to date."""
        if self.compact is not None:
            self.compact.update_statistics()

    def end(self) -> None:
        """From now on the network answers itself."""
        self.catch_up()
        self.compact, self.expected = None, False


def _is_part_of(short: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> bool:
    """Whether `short` are inputs of the same kind with fewer samples."""
    kinds = [[(x.shape[1:], x.dtype, x.device) for x in some] for some in (short, batch)]
    return kinds[0] == kinds[1] and sum(x.numel() for x in short) < sum(x.numel() for x in batch)
