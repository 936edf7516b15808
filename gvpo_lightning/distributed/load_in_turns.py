"""Ranks of one machine load whole models one after the other, as many at once as memory has room for."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy


@contextmanager
def loading_in_turns(strategy: Strategy, size: Callable[[], int]) -> Iterator[None]:
    """Inside, a rank may load a model of `size()` bytes before it is sharded: as many ranks at once as memory has room.

    Every rank must enter, and must not wait for another inside.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        yield
        return
    room = torch.tensor(max(1, int(0.8 * available_host_memory() // size())), device=strategy.root_device)
    at_once = int(strategy.reduce(room, reduce_op="min"))
    turn, num_turns = strategy.local_rank // at_once, math.ceil(strategy.num_processes / at_once)
    for _ in range(turn):
        strategy.barrier()
    try:
        yield
    finally:
        for _ in range(num_turns - turn):
            strategy.barrier()


def available_host_memory() -> int:
    """Bytes that this machine has left; more than there can be where it does not say."""
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return 2**60
    lines = dict(line.split(":") for line in facts.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
