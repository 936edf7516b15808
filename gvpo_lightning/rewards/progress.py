"""A progress bar for rewards that take long."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SLOW = 5.0  # seconds without a bar

_bars: list[Callable[[int], None]] = []  # the bar at hand is the last


def advance(count: int) -> None:
    """Tell the bar of the rewards at hand, if there is one, of so many more completions."""
    if _bars:
        _bars[-1](count)


@contextmanager
def reward_bar(name: str, total: int, *, shown: bool) -> Iterator[None]:
    """After 5 seconds inside, a bar on stderr; `advance` moves it."""
    done, ended, start = 0, threading.Event(), time.time()

    def add(count: int) -> None:
        nonlocal done
        done += count

    def show() -> None:
        if ended.wait(SLOW):
            return
        with tqdm(total=total, desc=name, leave=False) as bar:
            bar.start_t = start
            while not ended.wait(0.5):
                bar.n = done
                bar.refresh()

    thread = threading.Thread(target=show, daemon=True)
    if shown:
        thread.start()
    _bars.append(add)
    try:
        yield
    finally:
        _bars.pop()
        ended.set()
        if thread.is_alive():
            thread.join()
