"""Run a compiled loop on several threads: torch's own, where that is possible.

A loop is a Numba `cfunc(void*)` that takes its work piece by piece from a shared counter, so any number of threads may
run it at once. A second pool of threads beside torch's would fight with it for the cores: idle OpenMP threads spin for
milliseconds, as long as a whole step. torch's pool is reached through the OpenMP library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def run(loop: Any, data: int, *, alone: bool) -> None:
    """loop(data) on as many threads as torch uses, or on this one alone; returns when all are through."""
    threads = 1 if alone else torch.get_num_threads()
    if threads <= 1:
        loop.ctypes(data)
        return
    parallel = _openmp()
    if parallel is not None:
        parallel(loop.address, data, threads, 0)
        return
    others = [_pool().submit(loop.ctypes, data) for _ in range(threads - 1)]
    loop.ctypes(data)
    for other in others:
        other.result()


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel(function, data, threads, flags) of the OpenMP library that belongs to torch; None if not found."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "omp" in line}
    except OSError:
        return None
    home = os.path.dirname(torch.__file__)
    for path in sorted(paths):
        name = os.path.basename(path)
        if name.startswith(("libgomp", "libomp", "libiomp")) and os.path.dirname(path).startswith(home):
            parallel = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if parallel is not None:
                parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
                parallel.restype = None
                return parallel
    return None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="torch-bregman")
