"""Stopping between two steps: Ctrl-C and SIGTERM ask, a second one kills."""

import signal
import time


class StopRequest:
    """Context in which SIGINT and SIGTERM only set `signal`; the training loop looks at it after every step.

    A second signal meets the handlers of before, which end the process. One within half a second of the first is taken for the same
    request: a launcher passes on the Ctrl-C that the terminal has already sent to its workers.
    """

    def __init__(self):
        self.signal = None
        self._at = 0.0
        self._before = {}

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.signal is None:
            self.signal, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > 0.5:
            self.__exit__()
            signal.raise_signal(number)
