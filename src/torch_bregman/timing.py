"""The one paired race: jobs in turn, in an order that is drawn anew every round, so that all meet the same machine."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

MOST_CALLS = 50  # of one job in a round, however short it is

Name = TypeVar("Name")


def race(
    jobs: Mapping[Name, Callable[[], object]],
    rounds: int,
    *,
    seconds: float = 0.0,
    calls: int = 3,
    block: float | None = None,
    before: Callable[[Name], object] = lambda _: None,
    say: Callable[[int], object] = lambda _: None,
) -> dict[Name, list[list[float]]]:
    """Seconds of every call, job by job, round by round.

    In its turn a job is called once without a clock, for the caches hold what another one left, and then `calls` times
    in a row. Figures of the same round belong together: they saw the same machine.

    Args:
        jobs: what is called, by name.
        rounds: at least so many, and more until `seconds` are over.
        seconds: the least time that the race takes.
        calls: of a job in a round.
        block: calls of a job fill so many seconds of a round instead, `MOST_CALLS` at most. A round in front of the
            others, which is not counted, finds out how many these are.
        before: called with the name of a job whose turn it is.
        say: called with the number of a round that begins, from 1, or 0 for the one in front.
    """
    clock, order, draw = (
        time.perf_counter,
        list(jobs),
        random.Random(0),
    )  # the user's random numbers stay where they are
    times: dict[Name, list[list[float]]] = {name: [] for name in jobs}
    often = dict.fromkeys(jobs, calls)
    number, end = 0 if block else 1, clock() + seconds
    while number <= rounds or clock() < end:
        say(number)
        draw.shuffle(order)
        for name in order:
            job, row = jobs[name], []
            before(name)
            job()
            for _ in range(often[name]):
                start = clock()
                job()
                row.append(clock() - start)
            if block and number == 0:
                often[name] = min(max(round(block / max(min(row), 1e-9)), 1), MOST_CALLS)
            else:
                times[name].append(row)
        number += 1
    return times


@contextmanager
def without_collection() -> Iterator[None]:
    """Without Python's garbage collection, which would be counted to whoever is running."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
