"""Async rewards: many completions at once, each with its own time limit."""

import asyncio
import functools
import time

import pytest

from gvpo_lightning.rewards import Rewards, RewardSettings
from gvpo_lightning.rewards.protocol import RewardContractError
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
    judge, start = Judge(), time.perf_counter()
    found, _ = ask(judge, ["x" * (n % 7) for n in range(60)], max_concurrency=20)
    assert [rewarded.total for rewarded in found] == [n % 7 for n in range(60)]
    assert judge.most == 20
    assert judge.entered == 0
    assert 0.3 <= time.perf_counter() - start < 3.0


def test_each_failure_costs_its_completion_alone():
    found, tally = ask(functools.partial(patient), ["7", "raise", "hang", "nan", "none", "8"], timeout=0.3)
    assert [rewarded.failure for rewarded in found] == [
        *(None, "reward_raised", "reward_timeout", "reward_not_finite", None, None)
    ]
    assert [found[0].total, found[5].total] == [1.0, 0.0]
    assert "KeyError: 'no such answer'" in tally.first["partial"]


def test_a_time_limit_of_the_rewards_own_is_an_error_of_its_own():
    async def strict(prompts, completions, **columns):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(1)

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
