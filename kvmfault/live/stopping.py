"""Ending on request: signals that a loop can wait for."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["Stop", "stopping"]


class Stop:
    """What ends a recording: readable once somebody asked. Made by ``stopping``."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.asked = False


@contextmanager
def stopping() -> Generator[Stop]:
    """For as long as this lasts, Ctrl-C and the signals that end a process ask for the end instead of being it."""
    out, into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    stop = Stop(out)

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        with suppress(BlockingIOError):
            os.write(into, b"\0")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(into)
        os.close(out)
