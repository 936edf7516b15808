"""What a reward is, and how one is called and its answer checked.

Reward workers import this: it must not import torch.
"""

import copy
import functools
import inspect
import math
import numbers
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

Reward = Callable[..., Any]  # (prompts, completions, **columns) -> list of float or None, or a coroutine of one

RAISED, TIMEOUT, DIED, NOT_FINITE = "reward_raised", "reward_timeout", "reward_died", "reward_not_finite"
REASONS = (RAISED, TIMEOUT, DIED, NOT_FINITE)
COMPONENT = "reward/"  # begins the columns that `predict` writes of each reward
# of the offline format, what a row says of its completions; the other columns are the prompt's
COMPLETION_COLUMNS = ("completions", "rewards", "token_ids", "truncated", "sources", "reference_logprobs", "reference")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
TOKEN_IDS = "completion_ids"  # the column that only rewards that name it are given


class RewardContractError(ValueError):
    """An answer that is no list of rewards, whatever the completions are: a mistake in the reward's code."""


class RewardError(RuntimeError):
    """Rewards that stop the run. It is raised on all ranks together, so that they can save what has been trained."""


class SharedContractError(RewardError, RewardContractError):
    """A `RewardContractError` of which all ranks know."""


@dataclass(frozen=True)
class Failure:
    """A reward that has failed on one completion: one of `REASONS`, and the traceback or what else is known."""

    reason: str
    text: str


Value = float | None | Failure  # of one reward for one completion


def call_reward(reward: Reward, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, Any]) -> Any:
    """What the reward returns: asked by name where it names its `completions`, in whatever order; else by position.

    It is given copies, of each entry one: what it changes in them changes nothing for anybody else.
    """
    prompts, completions = _copies(prompts), _copies(completions)
    columns = {name: _copies(values) for name, values in columns.items()}
    parameters = inspect.signature(reward).parameters
    if "completions" not in parameters:
        return reward(prompts, completions, **columns)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "prompts" in parameters or takes_any:
        columns = {"prompts": prompts} | columns
    return reward(completions=completions, **columns)


def seed_globals(seed: int) -> None:
    """Have Python's and numpy's global random numbers start from `seed`."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _copies(values: Sequence[Any]) -> list[Any]:
    """A list of its own, whose entries share nothing that can be changed."""
    return [value if isinstance(value, (str, bytes, int, float)) else _copy(value) for value in values]


def _copy(value: Any) -> Any:
    if type(value) is list:  # such as token ids, which this copies several times faster
        return _copies(value)
    try:
        return copy.deepcopy(value)
    except Exception:  # such as an open file
        return value


def checked_values(name: str, values: Any, completions: Sequence[str]) -> list[Value]:
    """A reward's answer, one entry a completion; an exception in it is a failure on that completion.

    Raises:
        RewardContractError: no list, tuple or array with one entry a completion, or an entry that is neither a number
            nor None.
    """
    is_array = getattr(values, "ndim", None) == 1 and not isinstance(values, memoryview)
    is_list = isinstance(values, Sequence) and not isinstance(values, (str, bytes, bytearray, memoryview))
    got: object = len(values) if is_list or is_array else None
    if got != len(completions):
        if got is None:
            shape = f" of shape {tuple(values.shape)}" if hasattr(values, "shape") else ""
            got = f"{type(values).__name__}{shape}: return a list, a tuple or a 1-d array"
        raise RewardContractError(
            f"The reward {name} must return one entry a completion, {len(completions)}, got {got}."
        )
    return [_checked(name, value, completion) for value, completion in zip(values, completions, strict=True)]


def _checked(name: str, value: Any, completion: str) -> Value:
    if value is None:
        return None
    if isinstance(value, Exception):
        return Failure(RAISED, f"{type(value).__name__}: {value}")
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # numpy's texts and dates have 0 dimensions
    if not isinstance(number, numbers.Real):
        raise RewardContractError(
            f"The reward {name} must return numbers or None, got {value!r} for the completion {completion[:80]!r}."
        )
    try:
        number = float(number)
    except OverflowError:  # an int or a fraction
        return Failure(NOT_FINITE, "it returned a number beyond those that a float can hold")
    return number if math.isfinite(number) else Failure(NOT_FINITE, f"it returned {number}")


def reward_all_at_once(
    name: str, reward: Reward, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, Any]
) -> list[Value]:
    """Rewards from one call; where that raises, each completion is asked for alone, and those that raise have failed.

    Raises:
        RewardContractError: as `checked_values` does.
    """
    try:
        values = call_reward(reward, prompts, completions, columns)
    except Exception:
        if len(completions) == 1:
            return [Failure(RAISED, traceback.format_exc())]
        return [
            reward_all_at_once(name, reward, [prompts[i]], [completions[i]], {k: [v[i]] for k, v in columns.items()})[0]
            for i in range(len(completions))
        ]
    return checked_values(name, values, completions)


def reward_name(reward: Reward) -> str:
    """Its `name`, or else the function's or the class's; of a `functools.partial` that of what it calls."""
    named = getattr(reward, "name", None)
    if isinstance(reward, functools.partial) and not isinstance(named, str):
        return reward_name(reward.func)
    return named if isinstance(named, str) else getattr(reward, "__name__", type(reward).__name__)


def is_async(reward: Reward) -> bool:
    """Whether calling it gives a coroutine."""
    return inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(getattr(reward, "__call__", None))  # noqa: B004


def wants_token_ids(reward: Reward) -> bool:
    """Whether it names `completion_ids` among its arguments."""
    return TOKEN_IDS in inspect.signature(reward).parameters


def reward_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns that reach a reward: all but the prompt and what is recorded of completions."""
    if "completions" not in row:
        return [name for name in row if name != "prompt"]
    hidden = {"prompt", *COMPLETION_COLUMNS}
    return [name for name in row if name not in hidden and not name.startswith(COMPONENT)]


def _column_parameters(reward: Reward) -> list[inspect.Parameter]:
    """A reward's parameters but for the prompts and completions."""
    parameters = list(inspect.signature(reward).parameters.values())
    if any(p.name == "completions" for p in parameters):
        return [p for p in parameters if p.name not in ("prompts", "completions")]
    # prompts and completions by position, be it into *args
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    return named if len(named) < len(parameters) else parameters[2:]


def needed_columns(reward: Reward) -> list[str]:
    """The dataset's columns that a reward can't do without: its `required_columns`, or else what has no default."""
    needed = getattr(reward, "required_columns", None)
    if needed is None:
        parameters = _column_parameters(reward)
        needed = [p.name for p in parameters if p.kind in NAMED and p.default is inspect.Parameter.empty]
    return [column for column in needed if column != TOKEN_IDS]


def check_reward_columns(reward: Reward, columns: set[str]) -> None:
    """Raise ValueError where the reward's arguments and the dataset's columns do not fit."""
    if taken := columns & {"prompts", "completions"}:
        raise ValueError(
            f"Rewards are given their prompts and completions by the names of the dataset's columns {sorted(taken)}: "
            "give these columns other names."
        )
    parameters = _column_parameters(reward)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    unexpected = columns - {p.name for p in parameters if p.kind in NAMED}
    if unexpected and not takes_any:
        raise ValueError(
            f"The reward {reward_name(reward)} gets every column of the dataset by name, also {sorted(unexpected)}: "
            "let it take **columns."
        )
    missing = [column for column in needed_columns(reward) if column not in columns]
    if missing:
        raise ValueError(
            f"The reward {reward_name(reward)} needs the columns {missing}, but besides the prompt the dataset has "
            f"{sorted(columns)}."
        )
