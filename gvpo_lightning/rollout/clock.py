"""`Clock`: what a run spends its time on."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase, and the phase that the run is in; where an error has ended one, the phase stays."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("rollout", "reward", "reference", "train"), 0.0)
        self.phase = "train"
        self._started = 0.0

    def start(self) -> None:
        """A micro-batch is trained from now on, until `stop`."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """It has been trained."""
        self.seconds["train"] += time.perf_counter() - self._started

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what is spent inside to the phase; after it the run trains again."""
        start, self.phase = time.perf_counter(), phase
        yield
        self.seconds[phase] += time.perf_counter() - start
        self.phase = "train"
