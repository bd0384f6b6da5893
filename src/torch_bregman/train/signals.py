"""Ctrl-C and SIGTERM, which let a run save its state."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag that the loop reads; a second one interrupts at once.

    `patient`: it does not, for torchrun sends one that the terminal has sent already, and kills who takes too long.
    """
    flag = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if flag.is_set() and not patient:
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is not threading.main_thread():
        yield flag.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
