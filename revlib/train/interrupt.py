"""Ctrl-C and SIGTERM as a question that the training loop asks when it can afford to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal has asked the run to stop; 0 as long as none has."""

    signal_number = 0

    def receive(self, signal_number: int, frame: FrameType | None) -> None:
        self.signal_number = signal_number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Notes Ctrl-C and SIGTERM, for as long as it is open, where they would end the process.

    Later ones change nothing: a launcher passes on a Ctrl-C that its processes got already.
    """
    request = StopRequest()
    # Python lets no other thread handle signals; a run in one is stopped by who started it.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, request.receive) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
