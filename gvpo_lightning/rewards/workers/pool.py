"""`RewardPool`: processes that rewards run in, one completion at a time, each with a time limit.

Why not a library's pool: multiprocessing's start methods, which they all build on, either run the user's script again
in every worker (spawn, forkserver) or let it inherit the sockets of a distributed run and a started CUDA (fork).
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import cloudpickle

from gvpo_lightning.rewards.protocol import DIED, TIMEOUT, Failure, Reward, RewardContractError, Value

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


START_TIMEOUT = 600.0  # seconds to import what the rewards need
LOADING = -1


@dataclass(frozen=True)
class Task:
    """One completion, text or messages, for one reward, by name; `columns` are those of its row."""

    reward: str
    prompt: Any
    completion: Any
    columns: dict[str, Any]
    seed: int = 0


class Worker:
    """One process, and what it is at."""

    def __init__(self, payload: bytes) -> None:
        self.connection, theirs = Pipe()
        self.trace = tempfile.TemporaryFile()  # noqa: SIM115  # where it writes its stack when it is asked to, or crashes
        inherited = (theirs.fileno(), self.trace.fileno())
        self.process = start_process(
            [sys.executable, str(Path(__file__).with_name("worker.py")), *map(str, inherited), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=inherited,
            env={"OMP_NUM_THREADS": "1"} | os.environ,
            start_new_session=True,  # so that what a reward has started, and what stays in its session, ends with it
        )
        theirs.close()
        self.asked = 0
        self.task: int | None = LOADING
        self.deadline = time.monotonic() + START_TIMEOUT
        with contextlib.suppress(OSError):  # its end is noticed when it should answer
            self.connection.send_bytes(payload)

    def give(self, number: int, task: Task, timeout: float) -> bool:
        """Ask for one completion; False where the process has ended while it was idle."""
        try:
            if self.connection.poll():
                return False
            self.connection.send((self.asked + 1, task.seed, task.reward, task.prompt, task.completion, task.columns))
        except OSError:
            return False
        self.asked += 1
        self.task, self.deadline = number, time.monotonic() + timeout
        return True

    def finish(self) -> None:
        """It has answered, and can be asked again."""
        self.task = None

    def stack(self) -> str:
        """Where in its code it is, or was when it crashed; empty where that can't be known."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)
            until = time.monotonic() + 1.0
            while not self._has_whole_stack() and time.monotonic() < until:
                time.sleep(0.01)
        self.trace.seek(0)
        return self.trace.read().decode(errors="replace").strip()

    def _has_whole_stack(self) -> bool:
        """Whether the stack ends where all of them do: it is written line by line, and those that are deep are cut."""
        written = os.pread(self.trace.fileno(), 1_000_000, 0)  # a seek would move the process's own place
        return written.endswith((b" in <module>\n", b"  ...\n"))

    def kill(self) -> int:
        """End it, and what it has started that stays in its session's process group; returns its status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        self.trace.close()
        return self.process.wait()


class RewardPool:
    """Runs rewards in processes that are started once; one that hangs or dies is replaced.

    Args:
        rewards: by name.
        num_workers: processes.
        timeout: seconds for one completion.

    Raises:
        ValueError: a reward that can't be sent to another process.
    """

    def __init__(self, rewards: dict[str, Reward], num_workers: int, timeout: float) -> None:
        self.rewards, self.num_workers, self.timeout = rewards, num_workers, timeout
        self._payload = pickle.dumps((sys.path, {name: _pickled(name, reward) for name, reward in rewards.items()}))
        self._workers: list[Worker] = []
        weakref.finalize(self, _kill_all, self._workers, os.getpid())

    def __reduce__(self) -> tuple[Any, ...]:
        return RewardPool, (self.rewards, self.num_workers, self.timeout)  # processes can't be copied

    def start(self) -> None:
        """Start what processes are missing; this does not wait for them."""
        while len(self._workers) < self.num_workers:
            self._workers.append(Worker(self._payload))

    def close(self) -> None:
        """End the processes; `start` or `run` would start others."""
        _kill_all(self._workers, os.getpid())

    def wait_until_loaded(self) -> None:
        """RewardContractError where a worker can't load the rewards."""
        try:
            self.start()
            while any(worker.task == LOADING for worker in self._workers):
                answers = dict(self._answers())
                assert not answers, "nothing has been asked yet"
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Sequence[Task], advance: Callable[[int], object] = lambda count: None) -> list[Value]:
        """The reward of each task, in their order; `advance` is told how many have come, at least once a second.

        Raises:
            RewardContractError: an answer that is no reward, or rewards that a worker can't load.
        """
        values: list[Value] = [None] * len(tasks)
        waiting = deque(range(len(tasks)))
        left = len(tasks)
        try:
            while left:
                self.start()
                self._hand_out(tasks, waiting)
                done = dict(self._answers())
                for number, value in done.items():
                    values[number] = value
                left -= len(done)
                advance(len(done))
        except BaseException:
            self.close()  # whatever they are at
            raise
        return values

    def _hand_out(self, tasks: Sequence[Task], waiting: deque[int]) -> None:
        for worker in list(self._workers):
            if worker.task is not None or not waiting:
                continue
            if worker.give(waiting[0], tasks[waiting[0]], self.timeout):
                waiting.popleft()
            else:
                self._remove(worker)

    def _answers(self) -> Iterator[tuple[int, Value]]:
        """What has come of the tasks that are being worked on, after a second at most."""
        busy = {worker.connection: worker for worker in self._workers if worker.task is not None}
        if not busy:
            return
        nearest = min(worker.deadline for worker in busy.values()) - time.monotonic()
        ready = set(wait(list(busy), min(max(nearest, 0.0), 1.0)))
        for connection, worker in busy.items():
            number = worker.task
            assert number is not None
            if connection in ready:
                answer = self._receive(worker)
            elif time.monotonic() > worker.deadline:
                limit = (
                    f"{START_TIMEOUT:g} s to load"
                    if number == LOADING
                    else f"{self.timeout:g} s (reward_settings.timeout)"
                )
                answer = Failure(TIMEOUT, f"it took longer than {limit}. {worker.stack()}".strip())
                self._remove(worker)
            else:
                continue
            if number == LOADING:
                _check_loaded(answer)
            else:
                yield number, answer

    def _receive(self, worker: Worker) -> Any:
        try:
            number, answer = worker.connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):  # the connection ends just before the process
                worker.process.wait(1.0)
            stack = worker.stack()
            return Failure(DIED, f"its process ended with status {self._remove(worker)}. {stack}".strip())
        if number != worker.asked:  # a process that the reward has forked answers too
            self._remove(worker)
            return Failure(DIED, f"its process gave answer {number} to question {worker.asked}.")
        if isinstance(answer, RewardContractError):
            raise answer
        worker.finish()
        return answer

    def _remove(self, worker: Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()


def _check_loaded(answer: Any) -> None:
    if isinstance(answer, Failure):
        raise RuntimeError(f"A reward worker could not start: {answer.text}")
    if answer is not None:
        raise RewardContractError(
            f"A reward worker could not load the rewards: {answer.strip().splitlines()[-1]}. Keep what a reward needs "
            f"in modules that can be imported, or set its attribute in_process = True.\n{answer}"
        )


def _pickled(name: str, reward: Reward) -> bytes:
    """As it is now: what a reward changes in itself later stays in the process where it happens."""
    try:
        return cloudpickle.dumps(reward)
    except Exception as error:
        raise ValueError(
            f"The reward {name} can't be sent to a worker process ({type(error).__name__}: {error}): set its attribute "
            "in_process = True, or reward_settings.num_workers=0."
        ) from error


def _kill_all(workers: list[Worker], owner: int) -> None:
    if os.getpid() != owner:  # a forked process has no children to end
        return
    while workers:
        workers.pop().kill()
