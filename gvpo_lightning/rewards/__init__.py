"""Rewards: any callable `(prompts, completions, **columns) -> list of float or None`, and those we ship.

`prompts` are as in the dataset (text or messages), `completions` are text; both, and every other column
of the dataset, have one entry a completion. `None`: this reward does not apply. docs/rewards.md has the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gvpo_lightning.rewards.maths import BoxedMath
from gvpo_lightning.rewards.model import RewardModel
from gvpo_lightning.rewards.protocol import Reward, RewardError, check_reward_columns, reward_columns, reward_name
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rewards.text import ExactAnswer, Format, LengthPenalty, last_number

if TYPE_CHECKING:
    from gvpo_lightning.rewards.remote import RemoteReward
    from gvpo_lightning.rewards.run import Rewards

__all__ = [
    "BoxedMath",
    "ExactAnswer",
    "Format",
    "LengthPenalty",
    "RemoteReward",
    "Reward",
    "RewardError",
    "RewardModel",
    "RewardSettings",
    "Rewards",
    "check_reward_columns",
    "last_number",
    "reward_columns",
    "reward_name",
]

_HEAVY = {"RemoteReward": "remote", "Rewards": "run"}  # imports that reward workers do without


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
