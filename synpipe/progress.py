"""Messages about long work, for a terminal or for Dagster's log."""

import time
from collections.abc import Callable

Log = Callable[[str], None]


class Progress:
    """Logs every few seconds how far a task has come, how fast it runs, and how long it will still take."""

    INTERVAL_S = 3.0

    def __init__(self, log: Log, total: int, unit: str):
        self._log, self._total, self._unit = log, total, unit
        self._done = 0
        self._started = self._spoken = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._spoken >= self.INTERVAL_S:
            self._spoken = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0
            self._log(f"{self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left:,.0f} s left")
