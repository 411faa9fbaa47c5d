"""SIGINT and SIGTERM: let the epoch end and a checkpoint be written; a second one stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop; `signum` is by which signal, 128 + signum the exit code, `hint` how to go on."""

    def __init__(self, signum: int, hint: str = "") -> None:
        super().__init__(signum, hint)
        self.signum, self.hint = signum, hint


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {s: signal.signal(s, handler) for s in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """Turn both signals into `Stopped`, wherever the program is."""

    def handler(signum: int, frame: FrameType | None) -> None:
        del frame
        raise Stopped(signum)

    with _handled(handler):
        yield


@contextmanager
def stop_between_epochs(*, quiet: bool) -> Iterator[Callable[[], int | None]]:
    """requested(): the signal that came, or None.  The second signal raises `Stopped` at once.

    quiet: say nothing when the first comes.
    """
    received: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        del frame
        if received:
            raise Stopped(signum)
        received.append(signum)
        if not quiet:  # not print: the handler may have interrupted one, and buffered files are not reentrant
            os.write(2, b"stopping after this epoch, with a checkpoint; once more to stop at once\n")

    with _handled(handler):
        yield lambda: received[0] if received else None
