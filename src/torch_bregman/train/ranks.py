"""Several processes that train one network, each on its part of every batch. For one process all of it does nothing."""

from __future__ import annotations

import os
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..choices import choose
from ..data import DataError
from ..optim.options import check_number
from .errors import RunError
from .recipe import RIVALS, Recipe

STRATEGIES = ("none", "ddp", "fsdp")
TORCHRUN = "torchrun --standalone --nproc-per-node 2 -m torch_bregman"

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which of the processes this one is, and what they do together."""

    strategy: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that shows and writes things."""
        return self.rank == 0

    # ------------------------------------------------------------------ where things are

    def device_name(self, name: str) -> str:
        """The device of this process where `name` was asked for: each has a GPU of its own."""
        if self.strategy == "none":
            return name
        if name not in ("auto", "cpu", "cuda"):
            raise ValueError(f"Invalid `device`: {name!r}; with --strategy expected cpu, cuda or auto.")
        on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
        return f"cuda:{self.local_rank}" if on_gpu else "cpu"

    def wrap(self, model: nn.Module, x: Tensor) -> nn.Module:
        """What is called instead of `model`, and averages the gradients. With FSDP `model` itself, its weights cut.

        `x`: some samples.
        """
        device = x.device
        if self.strategy == "ddp":
            network = nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
            # After the first step DDP puts the gradients into other buckets, and then they are added up in another
            # order. That step is taken here, so that a resumed run adds up as one that was never interrupted.
            before = {name: value.clone() for name, value in model.named_buffers()}
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                network(x).sum().backward()
            model.zero_grad()
            for name, value in model.named_buffers():
                value.copy_(before[name])
            return network
        if self.strategy == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(device.type, (self.size,))
            # The parts of a Sequential are called one after the other, so that one of them is whole at a time.
            for part in [part for m in (*model.children(), model) if isinstance(m, nn.Sequential) for part in m]:
                if any(True for _ in part.parameters()):
                    fully_shard(part, mesh=mesh)
            fully_shard(model, mesh=mesh)
        return model

    def own_random_numbers(self, seed: int) -> None:
        """Let dropout differ between the ranks; the first has the numbers of a single process."""
        if self.rank:
            torch.manual_seed((seed + 1_000_003 * self.rank) % 2**63)

    # ------------------------------------------------------------------ a batch and its loss

    def count(self, samples: int) -> int:
        """How many of the samples of a batch are this rank's; those of two ranks differ by one at most."""
        full, rest = divmod(samples, self.size)
        return full + (self.rank < rest)

    def part(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This rank's samples of a batch. A rank for which there is none takes the last one, which then counts 0."""
        if self.size == 1:
            return tensors
        samples = len(tensors[0])
        full, rest = divmod(samples, self.size)
        first = min(self.rank * full + min(self.rank, rest), samples - 1)
        return tuple(t[first : first + max(self.count(samples), 1)] for t in tensors)

    def weigh(self, loss: Tensor, samples: int) -> Tensor:
        """The mean loss of this rank's part, scaled so that the mean over the ranks is that over all `samples`."""
        return loss if self.size == 1 else loss * (self.count(samples) * self.size / samples)

    def average_(self, losses: Tensor) -> None:
        """The mean over the ranks, in place."""
        if self.size > 1 and losses.numel():
            dist.all_reduce(losses)
            losses /= self.size

    def total(self, *numbers: Tensor) -> list[float]:
        """The sums over the ranks."""
        stacked = torch.stack(numbers)
        if self.size > 1:
            dist.all_reduce(stacked)
        return stacked.tolist()

    def share_buffers(self, model: nn.Module) -> None:
        """Running statistics are those of the first rank, as DDP has it; before they are used or saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    # ------------------------------------------------------------------ decisions and values

    def any(self, *flags: bool) -> list[bool]:
        """Which flags are set on some rank."""
        if self.size == 1:
            return list(flags)
        return [bool(flag) for flag in self.largest(*map(int, flags))]

    def largest(self, *numbers: int) -> list[int]:
        """The largest over the ranks of each number."""
        values = torch.tensor(numbers)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def gather(self, value: T, group: dist.ProcessGroup | None = None) -> list[T]:
        """The value of every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=group)
        return values

    def on_first(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises on the first rank, on all of them."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except (RunError, DataError, ValueError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """`function` on the first rank of a machine, then on its other ranks: a file is downloaded once."""
        if self.size == 1:
            return function()
        value: T | None = None
        error: Exception | None = None
        for turn in (self.local_rank == 0, self.local_rank != 0):
            if turn:
                try:
                    value = function()
                except (RunError, DataError, ValueError, OSError) as caught:
                    error = caught
            for other in self.gather(error):
                if other is not None:
                    raise other
        return value  # type: ignore[return-value]


ONE_PROCESS = Processes()


class StatusChecks:
    """When the loop looks up from its steps to see how things stand: about every `every` seconds.

    Several ranks look after a number of steps on which they have agreed, for what follows takes all of them.
    """

    def __init__(self, ranks: Processes, every: float) -> None:
        self.ranks, self.every = ranks, every
        self._last = time.perf_counter()
        self._steps, self._wait = 0, 1

    def due(self, stopping: bool) -> bool:
        """Whether to look after this step."""
        self._steps += 1
        if self.ranks.size == 1:
            return stopping or time.perf_counter() - self._last > self.every
        return self._steps >= self._wait

    def agree(self, *flags: bool) -> list[bool]:
        """Which flags are set on some rank."""
        now = time.perf_counter()
        pace = int(self._steps * self.every / max(now - self._last, 1e-9))
        self._last = now
        if self.ranks.size == 1:
            return list(flags)
        *agreed, self._wait = self.ranks.largest(*map(int, flags), max(1, min(pace, 2 * self._steps)))
        self._steps = 0
        return [bool(flag) for flag in agreed]


def check(strategy: str, recipe: Recipe) -> None:
    """ValueError where the recipe cannot be trained by this strategy."""
    choose("strategy", strategy, STRATEGIES)
    if strategy != "fsdp":
        return
    if recipe.multilevel:
        raise ValueError("Invalid `strategy`: 'fsdp'; --multilevel trains whole weights, use --strategy ddp.")
    if recipe.optimizer in RIVALS:
        raise ValueError(f"Invalid `strategy`: 'fsdp'; {recipe.optimizer} masks whole weights, use --strategy ddp.")
    if recipe.precision == "fp16":
        raise ValueError("Invalid `strategy`: 'fsdp'; it is not tested with --precision fp16, use bf16.")


@contextmanager
def start(strategy: str, recipe: Recipe, timeout: float = 600.0) -> Iterator[Processes]:
    """Join the processes that torchrun has started, and leave them in the end.

    `timeout`: seconds after which a rank that does not answer is given up. Raises RunError where torchrun and
    `strategy` do not go together, and where another rank is lost.
    """
    check(strategy, recipe)
    check_number("timeout", timeout, strict=True)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if strategy == "none":
        if size > 1:
            raise RunError(
                f"torchrun has started {size} processes, and each would train on its own: add --strategy ddp or fsdp."
            )
        yield ONE_PROCESS
        return
    if not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")):
        raise RunError(f"--strategy {strategy} needs torchrun: {TORCHRUN} {shlex.join(sys.argv[1:])}")
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    ranks = Processes(strategy, rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    device = torch.device(ranks.device_name(recipe.device))
    if device.type == "cuda":
        if device.index >= torch.cuda.device_count():
            raise RunError(
                f"{ranks.local_size} processes on this machine, and {torch.cuda.device_count()} GPUs: each needs one."
            )
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        limit = timedelta(seconds=timeout)
        store = fresh_store(rank, size, timedelta(seconds=max(timeout, 600.0)))  # programs may start slowly
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        yield ranks
    except RuntimeError as error:
        if not _lost(error):
            raise
        # The group is not taken down: a rank that is gone would be waited for.
        late = "time" in str(error).lower()
        what = f"did not answer within the {timeout:g} seconds of --timeout" if late else "is gone"
        raise RunError(
            f"Another rank {what}. The last good checkpoint stays: torchrun --max-restarts N goes on from there by "
            "itself, and --resume by hand."
        ) from None
    except BaseException:
        dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def fresh_store(rank: int, size: int, timeout: timedelta) -> Store:
    """Where the ranks find each other's addresses, empty.

    When torchrun starts the ranks again its store still holds the addresses of those that are gone
    (github.com/pytorch/pytorch/issues/135712), and its count of restarts differs between machines. So the first rank
    makes up a name, and takes up with the processes that answer to it now.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    nonce = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", nonce)
        for other in range(1, size):
            answer = store.get(f"{nonce}/{other}").decode()
            store.set(f"{nonce}/{other}/{answer}", "")
        return PrefixStore(nonce, store)
    begun = time.monotonic()
    while time.monotonic() - begun < timeout.total_seconds():
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", nonce)
        if store.check([f"{attempt}/{rank}/{nonce}"]):
            return PrefixStore(attempt, store)
        time.sleep(0.05)
    raise RunError(f"The first rank did not answer within the {timeout.total_seconds():g} seconds of --timeout.")


def _lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
