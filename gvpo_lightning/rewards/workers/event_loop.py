"""Async rewards: all completions at once, in a thread of the training process that is left behind where it hangs."""

import asyncio
import contextlib
import contextvars
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gvpo_lightning.rewards.protocol import (
    RAISED,
    TIMEOUT,
    Failure,
    Reward,
    RewardContractError,
    Value,
    call_reward,
    checked_values,
)
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rewards.workers.pool import Task

GRACE = 2.0  # seconds beyond a time limit after which the event loop counts as held up
ENTERED, ENDED = -1, -2


def reward_concurrently(
    reward: Reward,
    tasks: Sequence[Task],
    settings: RewardSettings,
    advance: Callable[[int], object] = lambda count: None,
) -> list[Value]:
    """The reward of each task, each from a call of its own with its own time limit.

    A reward that is an async context manager is entered once around them all; where that fails, all have failed.

    Raises:
        RewardContractError: an answer that is no reward.
    """
    return _Round(reward, tasks, settings, advance).values() if tasks else []


class _Round:
    """The calls for some tasks: a thread with the event loop puts what it gets into `news`, the caller's reads it."""

    def __init__(
        self, reward: Any, tasks: Sequence[Task], settings: RewardSettings, advance: Callable[[int], object]
    ) -> None:
        self.reward, self.tasks, self.settings, self.advance = reward, tasks, settings, advance
        self.news: queue.SimpleQueue[tuple[int, Value | RewardContractError]] = queue.SimpleQueue()
        self.is_abandoned = False
        self.cancel: Callable[[], object] = lambda: None
        run = contextvars.copy_context().run
        self.thread = threading.Thread(target=run, args=(self._run, _cuda_device()), daemon=True, name="async-reward")

    def values(self) -> list[Value]:
        """The reward of each task; those that are missing when nothing happens any more have timed out."""
        self.thread.start()
        found: dict[int, Value] = {}
        try:
            failure = self._listen(found)
        except queue.Empty:
            self.is_abandoned = True
            late = Failure(TIMEOUT, self._where_it_hangs())
            return [found.get(number, late) for number in range(len(self.tasks))]
        finally:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self.cancel()
            self.thread.join(0 if self.is_abandoned else GRACE)  # what was interrupted may end in order
            self.is_abandoned = True
        return [found[number] if failure is None else failure for number in range(len(self.tasks))]

    def _listen(self, found: dict[int, Value]) -> Failure | None:
        """Find the completions' values; returns what has failed for all of them."""
        while True:
            number, value = self.news.get(timeout=self.settings.timeout + GRACE)
            if isinstance(value, RewardContractError):
                raise value
            if number == ENDED:
                assert value is None or isinstance(value, Failure)
                return value
            if number != ENTERED:
                found[number] = value
                self.advance(1)

    def _where_it_hangs(self) -> str:
        frame = sys._current_frames().get(self.thread.ident or 0)
        stack = "".join(traceback.format_stack(frame, limit=10)) if frame is not None else ""
        return (
            f"nothing has come for longer than {self.settings.timeout:g} s (reward_settings.timeout): an async reward "
            f"must await what takes long, or it holds up all completions. The event loop is at:\n{stack}"
        )

    def _run(self, device: int | None) -> None:
        """In the thread: whatever comes here is not a completion's own."""
        if device is not None:
            torch.cuda.set_device(device)
        try:
            asyncio.run(self._ask_all())
        except RewardContractError as error:
            self.news.put((ENDED, error))
        except BaseException:  # also SystemExit, which would end the thread without a word
            self.news.put((ENDED, Failure(RAISED, traceback.format_exc())))

    async def _ask_all(self) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self.cancel = lambda: loop.call_soon_threadsafe(task.cancel)
        free = asyncio.Semaphore(self.settings.max_concurrency)
        is_entered = hasattr(self.reward, "__aenter__")
        if is_entered:
            async with asyncio.timeout(self.settings.timeout):
                await self.reward.__aenter__()
            self.news.put((ENTERED, None))
        try:
            await asyncio.gather(*(self._ask(number, free) for number in range(len(self.tasks))))
        finally:
            if is_entered and not self.is_abandoned:  # by then the reward may be at the next rollout
                async with asyncio.timeout(self.settings.timeout):
                    await self.reward.__aexit__(*sys.exc_info())
        self.news.put((ENDED, None))

    async def _ask(self, number: int, free: asyncio.Semaphore) -> None:
        task, timeout = self.tasks[number], self.settings.timeout
        async with free:
            start = time.monotonic()
            call = asyncio.ensure_future(_called(self.reward, task))
            try:
                await asyncio.wait([call], timeout=timeout)
            finally:
                is_late = not call.done() or time.monotonic() - start > timeout
                call.cancel()  # a reward need not heed that
            if is_late:
                values: Any = Failure(TIMEOUT, f"it took longer than {timeout:g} s (reward_settings.timeout).")
            else:
                values = call.result()
        if not isinstance(values, Failure):
            values = checked_values(task.reward, values, [task.completion])[0]
        self.news.put((number, values))


async def _called(reward: Reward, task: Task) -> Any:
    """What the reward returns; whatever it raises, be it SystemExit or CancelledError, is its failure."""
    columns = {name: [value] for name, value in task.columns.items()}
    try:
        return await call_reward(reward, [task.prompt], [task.completion], columns)
    except BaseException:
        return Failure(RAISED, traceback.format_exc())


def _cuda_device() -> int | None:
    """The one that this thread uses; another thread would use the first."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
