"""Ctrl-C between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODE = 130  # what a shell reports for a program that Ctrl-C ended


class Stopped(KeyboardInterrupt):
    """A run was interrupted after ``step`` whole steps, and saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped at step {step}; run the same command to resume")


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Holds back the first Ctrl-C; yields a function that says whether it came.

    A train step donates its state: interrupted half-way there is nothing left to save.
    A second Ctrl-C is not held back.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread alone
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
