"""Starts processes from a thread that stays: PR_SET_PDEATHSIG ends them with the thread that has started them."""

import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

Order = tuple[Sequence[str], dict[str, Any], "Future[subprocess.Popen[Any]]"]

_orders: dict[int, SimpleQueue[Order]] = {}  # by process: a forked one has none of the threads


def start_process(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """`subprocess.Popen`, whichever thread calls this."""
    own = os.getpid()
    if own not in _orders:
        _orders[own] = SimpleQueue()
        Thread(target=_start_what_is_ordered, args=(_orders[own],), daemon=True, name="reward-workers").start()
    started: Future[subprocess.Popen[Any]] = Future()
    _orders[own].put((command, options, started))
    return started.result()


def _start_what_is_ordered(orders: SimpleQueue[Order]) -> None:
    while True:
        command, options, started = orders.get()
        try:
            started.set_result(subprocess.Popen(command, **options))
        except BaseException as error:
            started.set_exception(error)
