"""Async rewards: all completions at once, in the training process."""

import asyncio
import threading
import traceback
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from gvpo_lightning.rewards.pool import Task
from gvpo_lightning.rewards.progress import advance
from gvpo_lightning.rewards.protocol import RAISED, TIMEOUT, Failure, Reward, Value, call_reward, checked_values
from gvpo_lightning.rewards.settings import RewardSettings


def reward_concurrently(reward: Reward, tasks: Sequence[Task], settings: RewardSettings) -> list[Value]:
    """The reward of each task, each from a call of its own with its own time limit.

    A reward that is an async context manager is entered once around them all.
    """
    return _run(_reward_all(reward, tasks, settings))


async def _reward_all(reward: Any, tasks: Sequence[Task], settings: RewardSettings) -> list[Value]:
    free = asyncio.Semaphore(settings.max_concurrency)

    async def one(task: Task) -> Value:
        async with free:
            value = await _reward_one(reward, task, settings.timeout)
        advance(1)
        return value

    async with AsyncExitStack() as stack:
        if hasattr(reward, "__aenter__"):
            await stack.enter_async_context(reward)
        return list(await asyncio.gather(*(one(task) for task in tasks)))


async def _reward_one(reward: Reward, task: Task, timeout: float) -> Value:
    columns = {name: [value] for name, value in task.columns.items()}
    try:
        async with asyncio.timeout(timeout) as limit:
            values = await call_reward(reward, [task.prompt], [task.completion], columns)
    except Exception:
        if limit.expired():
            return Failure(TIMEOUT, f"it took longer than {timeout:g} s (reward_settings.timeout).")
        return Failure(RAISED, traceback.format_exc())
    return checked_values(task.reward, values, [task.completion])[0]


def _run(coroutine: Coroutine[Any, Any, list[Value]]) -> list[Value]:
    """In this thread, or in another where this one has a running loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    result: list[list[Value]] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(asyncio.run(coroutine))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)  # which an interrupt does not wait for
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]
