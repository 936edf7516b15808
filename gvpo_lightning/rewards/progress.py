"""A progress bar for rewards that take long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

SLOW = 5.0  # seconds without a bar

_shown: list[bool] = []  # what the runs of rewards at hand want, the innermost last


@contextmanager
def bars_shown(shown: bool) -> Iterator[None]:
    """Whether bars are shown inside: on one rank alone, and where the Trainer shows its own."""
    _shown.append(shown)
    try:
        yield
    finally:
        _shown.pop()


@contextmanager
def reward_bar(name: str, total: int) -> Iterator[Callable[[int], object]]:
    """Gives a function to be told of so many more completions; after 5 seconds there is a bar on stderr."""
    hidden = not (_shown and _shown[-1])
    # miniters: every call may draw, also one that tells of no more completions
    with tqdm(total=total, desc=name, delay=SLOW, mininterval=1.0, miniters=0, leave=False, disable=hidden) as bar:
        yield bar.update
