"""Real processes: under tensor parallelism one rank asks rewards, and the others know what it meets."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from gvpo_lightning.rewards.protocol import RewardContractError
from tests.distributed.train_script import ROWS, make_module, make_trainer
from tests.forked import run_ranks


def validate(model: str) -> None:
    """Each rank writes down what it raises."""

    def too_many(prompts, completions, **columns):
        return [1.0] * 99

    too_many.in_process = True
    module = make_module(model, "full", reward=too_many)
    with pytest.raises((RuntimeError, RewardContractError)) as raised:
        make_trainer("tp", Path.cwd()).validate(module, DataLoader(ROWS[:2], batch_size=2, collate_fn=list))
    Path(f"raised{os.environ['LOCAL_RANK']}").write_text(f"{raised.typename}: {raised.value}")
    deadline = time.monotonic() + 60
    while not Path(f"raised{1 - int(os.environ['LOCAL_RANK'])}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os._exit(0)  # the strategy's own end would wait for the run that has failed


def test_a_reward_that_fails_in_validation_ends_all_ranks_of_the_model(arithmetic, tmp_path):
    run_ranks(tmp_path, 2, validate, str(arithmetic / "model"), timeout=100.0)
    first, second = ((tmp_path / f"raised{rank}").read_text() for rank in range(2))
    error = "RewardContractError: The reward too_many must return one entry a completion, 12, got 99."
    assert first == error
    assert second == f"RuntimeError: Sampling or a reward failed on the first rank that holds this model: {error}"
