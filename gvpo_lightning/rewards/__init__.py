"""Rewards: any callable `(prompts, completions, **columns) -> list of float or None`, and those we ship.

`prompts` are as in the dataset (text or messages), `completions` are text; both, and every other column
of the dataset, have one entry a completion. `None`: this completion has no reward and leaves its group.
"""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gvpo_lightning.batch import COMPLETION_COLUMNS
from gvpo_lightning.rewards.exact import ExactAnswer, last_number
from gvpo_lightning.rewards.maths import BoxedMath

__all__ = ["BoxedMath", "ExactAnswer", "Reward", "compute_rewards", "last_number"]

Reward = Callable[..., Sequence[float | None]]


def compute_rewards(
    reward: Reward, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]
) -> list[float]:
    """Call the reward and check its answer.

    Returns:
        one float a completion; NaN for those without a reward (None, NaN or infinite): the caller drops them.

    Raises:
        ValueError: not one entry a completion, or one that is no number; or a column that the reward needs is
            missing from the dataset.
        RuntimeError: the reward itself raised (its own error is the cause).
    """
    name = reward_name(reward)
    check_reward_columns(reward, set(columns))
    try:
        values = _call(reward, prompts, completions, columns)
    except Exception as error:
        raise RuntimeError(
            f"The reward {name} raised {type(error).__name__}: {error} (on {len(completions)} completions, the first "
            f"of prompt {str(prompts[0])[:80]!r})."
        ) from error
    if not hasattr(values, "__len__") or len(values) != len(completions):
        got = len(values) if hasattr(values, "__len__") else type(values).__name__
        raise ValueError(f"The reward {name} must return one entry a completion, {len(completions)}, got {got}.")
    for row, value in enumerate(values):
        is_number = isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0
        if value is not None and (not is_number or isinstance(value, str)):  # numpy's strings have 0 dimensions
            raise ValueError(
                f"The reward {name} must return numbers or None, got {value!r} for completion {row}: "
                f"{completions[row][:80]!r}."
            )
    return [float(v) if v is not None and math.isfinite(v) else math.nan for v in values]


def _call(reward: Reward, prompts: list[Any], completions: list[str], columns: dict[str, list[Any]]) -> Any:
    """By name where the reward names its `completions`, so in whatever order; else by position."""
    parameters = inspect.signature(reward).parameters
    if "completions" not in parameters:
        return reward(prompts, completions, **columns)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "prompts" in parameters or takes_any:
        columns = {"prompts": prompts} | columns
    return reward(completions=completions, **columns)


def reward_name(reward: Reward) -> str:
    """The function's or the class's name."""
    return getattr(reward, "__name__", type(reward).__name__)


def reward_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns that reach the reward: all but the prompt and what is recorded of completions."""
    hidden = {"prompt", *(COMPLETION_COLUMNS if "completions" in row else ())}
    return [name for name in row if name not in hidden]


def check_reward_columns(reward: Reward, columns: set[str]) -> None:
    """Raise ValueError where the reward's arguments and the dataset's columns do not fit."""
    needed = getattr(reward, "required_columns", None)
    parameters = list(inspect.signature(reward).parameters.values())
    plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    if any(p.name == "completions" for p in parameters):
        parameters = [p for p in parameters if p.name not in ("prompts", "completions")]
    else:  # prompts and completions by position, be it into *args
        named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
        parameters = named if len(named) < len(parameters) else parameters[2:]
    if needed is None:
        needed = [p.name for p in parameters if p.kind in plain and p.default is inspect.Parameter.empty]
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    unexpected = columns - {p.name for p in parameters if p.kind in plain}
    if unexpected and not takes_any:
        raise ValueError(
            f"The reward {reward_name(reward)} gets every column of the dataset by name, also {sorted(unexpected)}: "
            "let it take **columns."
        )
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(
            f"The reward {reward_name(reward)} needs the columns {missing}, but besides the prompt the dataset has "
            f"{sorted(columns)}."
        )
