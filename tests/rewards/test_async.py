"""Async rewards: many completions at once, each with its own time limit."""

import asyncio
import contextlib
import functools
import os
import signal
import sys
import threading
import time

import pytest

from gvpo_lightning.rewards import Rewards, RewardSettings
from gvpo_lightning.rewards.protocol import RewardContractError
from tests.forked import wait_until
from tests.rewards.rewards_for_tests import patient


def ask(reward, completions, **settings):
    rewards = Rewards(reward, RewardSettings(**settings))
    return rewards(["p"] * len(completions), completions, {"answer": ["7"] * len(completions)})


class Judge:
    """Counts how many it is asked for at once."""

    def __init__(self):
        self.running = self.most = self.entered = 0

    async def __aenter__(self):
        self.entered += 1

    async def __aexit__(self, *error):
        self.entered -= 1

    async def __call__(self, prompts, completions, answer):
        assert self.entered == 1
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.1)
        self.running -= 1
        return [float(len(completions[0]))]


def test_completions_are_asked_for_together_up_to_the_limit():
    judge = Judge()
    found, _ = ask(judge, ["x" * (n % 7) for n in range(60)], max_concurrency=20)
    assert [rewarded.total for rewarded in found] == [n % 7 for n in range(60)]
    assert judge.most == 20
    assert judge.entered == 0


def test_each_failure_costs_its_completion_alone():
    found, tally = ask(functools.partial(patient), ["7", "raise", "hang", "nan", "none", "8"], timeout=2.0)
    assert [rewarded.failure for rewarded in found] == [
        *(None, "reward_raised", "reward_timeout", "reward_not_finite", None, None)
    ]
    assert [found[0].total, found[5].total] == [1.0, 0.0]
    assert "KeyError: 'no such answer'" in tally.first["patient"]


def test_a_time_limit_of_the_rewards_own_is_an_error_of_its_own():
    async def strict(prompts, completions, **columns):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(1000)

    found, tally = ask(strict, ["7"])
    assert found[0].failure == "reward_raised"
    assert "TimeoutError" in tally.first["strict"]


def test_within_a_running_loop_as_in_a_notebook():
    async def cell():
        return ask(Judge(), ["x", "xx"])

    assert [rewarded.total for rewarded in asyncio.run(cell())[0]] == [1, 2]

    async def broken(prompts, completions, **columns):
        return ["high"]

    async def other_cell():
        return ask(broken, ["x"])

    with pytest.raises(RewardContractError, match="got 'high'"):
        asyncio.run(other_cell())


async def misbehaving(prompts, completions, **columns):
    """What a completion says is what it does."""
    (text,) = completions
    if text == "block":
        time.sleep(2.5)
    elif text == "cancelled":
        raise asyncio.CancelledError
    elif text == "exit":
        sys.exit(3)
    elif text == "huge":
        return [10**400]
    while text == "swallow":
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
        if LET_GO.is_set():
            break
    return [float(len(text))]


LET_GO = threading.Event()


def test_what_is_no_exception_or_heeds_no_time_limit_costs_its_completion_alone(monkeypatch):
    monkeypatch.setattr("gvpo_lightning.rewards.workers.event_loop.GRACE", 0.5)  # its thread goes on until it is let go
    LET_GO.clear()
    texts = ["7", "cancelled", "exit", "huge", "swallow", "8"]
    found, _ = ask(misbehaving, texts, timeout=2.0)
    LET_GO.set()
    wait_until(lambda: "async-reward" not in {thread.name for thread in threading.enumerate()})
    fates = [None, "reward_raised", "reward_raised", "reward_not_finite", "reward_timeout", None]
    assert [rewarded.failure for rewarded in found] == fates
    assert [found[0].total, found[-1].total] == [1, 1]


def test_an_answer_that_comes_after_its_time_limit_is_late():
    found, _ = ask(misbehaving, ["7", "block"], timeout=2.0, max_concurrency=1)
    assert [rewarded.failure for rewarded in found] == [None, "reward_timeout"]


class Stuck:
    """Blocks the event loop until it is let go, and tells which rollout enters and leaves."""

    def __init__(self):
        self.let_go, self.told = threading.Event(), []

    async def __aenter__(self):
        self.told.append("entered")

    async def __aexit__(self, *error):
        self.told.append("left")

    async def __call__(self, prompts, completions, answer):
        if completions[0] == "stuck":
            self.let_go.wait()
        return [float(len(completions[0]))]


def test_a_blocked_event_loop_is_left_behind_and_nothing_of_it_arrives_later(monkeypatch):
    monkeypatch.setattr("gvpo_lightning.rewards.workers.event_loop.GRACE", 0.3)
    stuck = Stuck()
    found, tally = ask(stuck, ["7", "stuck", "8"], timeout=2.0, max_concurrency=1)
    assert [rewarded.failure for rewarded in found] == [None, "reward_timeout", "reward_timeout"]
    assert "self.let_go.wait()" in tally.first["Stuck"]
    stuck.let_go.set()
    (left_behind,) = [thread for thread in threading.enumerate() if thread.name == "async-reward"]
    found, tally = ask(stuck, ["xx", "xxx"])
    assert [rewarded.total for rewarded in found] == [2, 3]
    left_behind.join(60.0)
    assert not left_behind.is_alive()
    assert stuck.told == ["entered", "entered", "left"]


@pytest.mark.parametrize("method", ["__aenter__", "__aexit__"])
@pytest.mark.parametrize(
    ("error", "shown"), [(ConnectionError("no judge"), "no judge"), (SystemExit(2), "SystemExit: 2")]
)
def test_what_can_not_be_entered_or_left_has_failed_on_all(method, error, shown):
    async def fail(*arguments):
        raise error

    judge = type("Judge", (Judge,), {method: fail})()
    judge.entered = 1
    found, tally = ask(judge, ["7", "8"])
    assert [rewarded.failure for rewarded in found] == ["reward_raised"] * 2
    assert shown in tally.first["Judge"]


def test_an_interrupt_ends_them_in_order(monkeypatch):
    monkeypatch.setattr("gvpo_lightning.rewards.workers.event_loop.GRACE", 60.0)  # however busy the machine is

    class Slow(Stuck):
        async def __call__(self, prompts, completions, answer):
            await asyncio.sleep(1000)

    def interrupt():
        wait_until(lambda: slow.told)
        os.kill(os.getpid(), signal.SIGINT)

    slow = Slow()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        ask(slow, ["7"])
    signal.signal(signal.SIGINT, before)
    assert slow.told == ["entered", "left"]
    assert not [thread for thread in threading.enumerate() if thread.name == "async-reward"]
