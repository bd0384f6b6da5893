"""The ranks of a DistributedDataParallel in the coarse phases: they average the gradients of the live part alone.

DDP's reducer waits for the gradient of every parameter it was made with, and of a restricted weight there is none. So
it is kept out, as by `no_sync()`, and what it would have done is done here, at the end of backward, with what is left.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .exchange import Exchange


class LiveGradientAverage:
    """Averages gradients at the end of backward, so that clipping, a GradScaler and accumulation see averages.

    A forward pass inside the user's own `no_sync()` adds up gradients of this rank, as ever; the next one outside it
    averages the sums.

    Args:
        ddp: the wrapped network.
        exchange: the weights that are restricted now.
        before_forward: called before a forward pass that gradients will be asked of.
    """

    def __init__(self, ddp: DistributedDataParallel, exchange: Exchange, before_forward: Callable[[], None]) -> None:
        self.ddp, self.exchange, self.before_forward = ddp, exchange, before_forward
        exchange.entered = self.watch
        self._wanted = True  # by the user: not inside no_sync()
        self._ours = False  # the last forward pass ran without DDP's reducer: the averages are made here
        self._queued = False
        self._seen: set[nn.Parameter] = set()
        ddp.register_forward_pre_hook(lambda *_: self._before())
        ddp.register_forward_hook(lambda *_: self._after(), always_call=True)
        for p in self._parameters():
            self.watch(p)

    def watch(self, parameter: Tensor) -> None:
        """A gradient that arrives here tells of a backward pass."""
        parameter.register_post_accumulate_grad_hook(lambda _: self._arrived())  # type: ignore[no-untyped-call]

    def first(self, numbers: list[float]) -> list[float]:
        """The numbers of the first rank, on every rank; as many everywhere."""
        held = torch.tensor(numbers, dtype=torch.float64, device=self._parameters()[0].device)
        dist.broadcast(held, dist.get_global_rank(self.ddp.process_group, 0), group=self.ddp.process_group)
        return held.tolist()

    def alike(self, flags: list[bool]) -> bool:
        """Whether they are the same on all ranks; as many everywhere."""
        both = torch.tensor([*flags, *(not flag for flag in flags)], device=self._parameters()[0].device).float()
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.ddp.process_group)
        return not bool((both[: len(flags)] * both[len(flags) :]).any())

    def _parameters(self) -> list[nn.Parameter]:
        """What DDP averages."""
        named = self.ddp.module.named_parameters()
        return [p for name, p in named if p.requires_grad and name not in self.ddp.parameters_to_ignore]

    def _before(self) -> None:
        """Of a forward pass."""
        self._wanted = self.ddp.require_backward_grad_sync
        if not torch.is_grad_enabled():
            return
        self.before_forward()
        self._queued = False  # a backward pass that failed has left it
        restricted = bool(self.exchange.parts)
        self._ours = restricted and self._wanted
        if restricted:
            self.ddp.require_backward_grad_sync = False
        elif self._wanted and self._seen:
            # With `find_unused_parameters` the reducer takes note of all that was used since it last ran, and for that
            # it insists on a gradient.
            for p in self._seen:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            self._seen.clear()

    def _after(self) -> None:
        self.ddp.require_backward_grad_sync = self._wanted
        if self._ours and torch.is_grad_enabled():
            self.ddp.require_forward_param_sync = True  # of buffers, as after every pass that is not in no_sync()

    def _arrived(self) -> None:
        if self._ours and not self._queued:
            self._queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """One sum over the ranks for each dtype. To average what is equal on all ranks again changes nothing."""
        self._queued = False
        live: dict[Tensor, nn.Parameter] = {part.live.full: part.live.values for part in self.exchange.parts}
        alike = collections.defaultdict(list)
        for p in self._parameters():
            held = live.get(p, p)
            if held is p and p.grad is not None and self.ddp.find_unused_parameters:
                self._seen.add(p)
            alike[held.device, held.dtype].append(held)
        for some in alike.values():
            # A parameter that this rank has not used counts as zero, one that none has used keeps no gradient.
            used = some[0].new_tensor([p.grad is not None for p in some])
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in some]
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), used])
            flat /= dist.get_world_size(self.ddp.process_group)  # before the sum, which half precision may not hold
            dist.all_reduce(flat, group=self.ddp.process_group)
            *means, used = torch.split(flat, [*(p.numel() for p in some), len(some)])
            torch._foreach_copy_(grads, [mean.view_as(p) for mean, p in zip(means, some, strict=True)])
            for i, (p, grad) in enumerate(zip(some, grads, strict=True)):
                if p.grad is None and used[i] > 0:
                    p.grad = grad
