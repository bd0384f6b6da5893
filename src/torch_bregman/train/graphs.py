"""Forward and backward passes that are recorded once, as CUDA graphs, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Replayed:
    """Calls `model`; on full batches in training mode what is replayed is the recording of the first one.

    A GPU is done with a small network sooner than Python has said what to do: recorded, the same kernels follow each
    other without it. They read and write the model's own parameters and buffers, so both must stay where they are in
    memory, and what Python decides in `forward` it decides once. Source: the documentation of
    `torch.cuda.make_graphed_callables`.
    """

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self._replay: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) != self.batch_size or not (self.model.training and torch.is_grad_enabled()):
            return self.model(x)
        if self._replay is None:
            self._replay = record(self.model, x)
        return self._replay(x)


def record(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """`model` on inputs like `x`, under the autocast of now. Its buffers and the random numbers stay as they are.

    No graph of an earlier pass may be alive, or the recording would depend on the stream it was made on.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    random = torch.cuda.get_rng_state(x.device)
    # The nodes that add up gradients will be those of the stream of the recording. The engine waits where it must, and
    # warns that this may be needless.
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:
        warn(False)
    # Casts of weights must be part of the recording, so none may come from the cache.
    mixed = torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False
    )
    with mixed:
        # Wrapped: the function replaces the forward of the module that it gets.
        replay: Any = torch.cuda.make_graphed_callables(Passes(model), (x.clone(),), allow_unused_input=True)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    torch.cuda.set_rng_state(random, x.device)
    return replay


class Passes(nn.Module):
    """A module that calls another one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)
