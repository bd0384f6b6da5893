"""The latencies: all contenders in one paired race for each batch size, each with one thread or all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from ..export.formats import silence
from ..export.reasons import reason
from ..timing import race, without_collection
from .contenders import Call, Maker
from .figures import DENSE, SPARSE, Latency

BLOCK = 0.01  # seconds of calls in a row of one contender in one round


def latencies(
    makers: Mapping[str, Maker], inputs: Mapping[int, tuple[Tensor, ...]], rounds: int, say: Callable[[str], None]
) -> Iterator[Latency]:
    """Of every contender at every batch size, with one thread or all."""
    threads = torch.get_num_threads()
    for batch, x in inputs.items():
        calls: dict[tuple[str, int], Call] = {}
        missing = {}
        try:
            with torch.no_grad():
                for name, make in makers.items():
                    say(f"latency at batch {batch}: getting ready: {name}")
                    try:
                        with silence():
                            calls |= _ready(name, make, x, threads)
                    except Exception as error:
                        if name in (DENSE, SPARSE):
                            raise
                        missing[name] = reason(error)
                times = _timed(calls, rounds, f"latency at batch {batch}", say)
        finally:
            torch.set_num_threads(threads)
        # By the mean: threads that now and then wait for a busy core have a good median.
        best = dict(sorted(calls, key=lambda key: float(np.mean(np.concatenate(times[key]))), reverse=True))
        for name in makers:
            if name in missing:
                yield Latency(name, batch, missing=missing[name])
                continue
            own, other = times[name, best[name]], times[SPARSE, best[SPARSE]]
            p50, p95 = np.quantile(np.concatenate(own), (0.5, 0.95))
            ratio = statistics.median(float(np.median(a) / np.median(b)) for a, b in zip(own, other, strict=True))
            yield Latency(name, batch, best[name], float(p50), float(p95), ratio)


def _ready(name: str, make: Maker, x: tuple[Tensor, ...], threads: int) -> dict[tuple[str, int], Call]:
    """The calls of a contender with all threads and with one, each called once: that may compile."""
    made = {}
    for number in dict.fromkeys((threads, 1)):
        torch.set_num_threads(number)
        made[name, number] = call = make(x)
        call()
    return made


def _timed(
    calls: Mapping[tuple[str, int], Call], rounds: int, what: str, say: Callable[[str], None]
) -> dict[tuple[str, int], list[list[float]]]:
    """Seconds of the calls in every round, each with its own number of threads."""
    with without_collection():
        return race(
            calls,
            rounds,
            block=BLOCK,
            before=lambda key: torch.set_num_threads(key[1]),
            say=lambda number: say(f"{what}: round {max(number, 1)} of {rounds}"),
        )
