"""Workers whose rewards start processes, and threads that start workers."""

import signal
import threading
import time

import pytest

from gvpo_lightning.rewards import Rewards, RewardSettings
from tests.rewards.rewards_for_tests import ends_a_child, forks


@pytest.fixture
def ask():
    """Asks a reward in one worker for completions; the worker is ended with the test."""
    asked = {}

    def ask(reward, completions):
        if reward not in asked:
            asked[reward] = Rewards(reward, RewardSettings(num_workers=1, timeout=60.0))
        found, tally = asked[reward](["p"] * len(completions), completions, {})
        assert not tally.counts
        return [rewarded.total for rewarded in found]

    yield ask
    for rewards in asked.values():
        rewards.close()


def test_a_rewards_children_end_when_they_are_told_to(ask):
    assert ask(ends_a_child, ["pool", "popen", "process"]) == [4, -signal.SIGINT, -signal.SIGTERM]


def test_a_forked_child_that_comes_back_answers_nothing(ask):
    assert ask(forks, ["exit", "raise", "return"] * 5) == [3, 1, 0] * 5


def test_workers_outlive_the_thread_that_has_started_them(ask):
    found = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.extend(ask(forks, ["exit"])))
        thread.start()
        thread.join()
        time.sleep(0.2)
    assert ask(forks, ["exit"]) == found[:1] == found[1:] == [3]
