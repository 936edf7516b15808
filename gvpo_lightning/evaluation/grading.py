"""The reward that says which completions are right."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gvpo_lightning.rewards import Reward, Rewards

Extractor = Callable[[str], str | None]  # the answer that a completion gives, None where it gives none


def grader(rewards: Rewards | None) -> tuple[str, Reward]:
    """Name and reward.

    Raises:
        ValueError: none, or several: their sum does not say what is right.
    """
    if rewards is None or len(rewards.functions) != 1:
        got = "none" if rewards is None else list(rewards.functions)
        raise ValueError(
            f"Benchmarks need exactly one reward, which is beyond 0.5 for right completions, got {got}: set "
            "model.reward to it, such as gvpo_lightning.rewards.BoxedMath, and model.reward_settings.weights to null."
        )
    return next(iter(rewards.functions.items()))


def answer_extractor(reward: Reward) -> Extractor | None:
    """The reward's own `extract_answer`, if it has one."""
    return getattr(reward, "extract_answer", None)


def reward_facts(rewards: Rewards) -> dict[str, Any]:
    """What scores depend on of rewards and their settings; arguments of those that are shipped alone."""
    functions = {name: _arguments(reward) for name, reward in rewards.functions.items()}
    return {"reward": functions, "reward_settings": asdict(rewards.settings)}


def _arguments(reward: Reward) -> dict[str, Any]:
    if not type(reward).__module__.startswith("gvpo_lightning.rewards."):  # others may hold what is not to be shown
        return {}
    plain = (str, int, float, list, tuple, type(None))
    return {k: v for k, v in vars(reward).items() if isinstance(v, plain) and not k.startswith("_")}
