"""What the benchmarks share: paired timings, and the parts of a layer."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name")
Job = Callable[[], object]


def paired(
    jobs: Mapping[Name, Job], rounds: int, *, skip: int = 2, untimed: int = 0, calls: int = 1, pause: float = 0.0
) -> dict[Name, list[float]]:
    """Seconds of a call of each job in every round, in which all have their turn, in random order.

    In its turn a job waits for `pause` seconds, is called `untimed` times, and then `calls` times in a row: their mean
    is one figure. The first `skip` rounds are not counted.
    """
    took: dict[Name, list[float]] = {name: [] for name in jobs}
    for round_ in range(rounds + skip):
        for name in random.sample(list(jobs), len(jobs)):
            if pause:
                time.sleep(pause)
            for _ in range(untimed):
                jobs[name]()
            start = time.perf_counter()
            for _ in range(calls):
                jobs[name]()
            seconds = (time.perf_counter() - start) / calls
            if round_ >= skip:
                took[name].append(seconds)
    return took


def parts(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, upstream: Tensor) -> dict[str, Job]:
    """Each part alone: a function of autograd computes the gradients of all inputs that ask for one."""
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    to_input, to_weights = layer(a, weight), layer(x, w)
    return {
        "forward": lambda: layer(x, weight),
        "to input": lambda: torch.autograd.grad(to_input, a, upstream, retain_graph=True),
        "to weights": lambda: torch.autograd.grad(to_weights, w, upstream, retain_graph=True),
    }
