"""`Rewards`: a run's rewards, where each of them runs, and what becomes of those that fail."""

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
from tqdm import tqdm

from gvpo_lightning.guard import Guard
from gvpo_lightning.rewards.protocol import (
    TOKEN_IDS,
    Failure,
    Reward,
    RewardError,
    Value,
    check_reward_columns,
    is_async,
    needed_columns,
    reward_all_at_once,
    reward_columns,
    reward_name,
    seed_globals,
    wants_token_ids,
)
from gvpo_lightning.rewards.settings import RewardSettings
from gvpo_lightning.rewards.workers.event_loop import reward_concurrently
from gvpo_lightning.rewards.workers.pool import RewardPool, Task
from gvpo_lightning.seeding import derive_seed


@dataclass
class Rewarded:
    """What the rewards say of one completion.

    Attributes:
        total: the weighted sum of those that apply; NaN where none does, or one has failed.
        components: each reward's own, by name; NaN where it does not apply or has failed.
        failure: the reason, one of `protocol.REASONS`, why the first has failed that has.
    """

    total: float
    components: dict[str, float]
    failure: str | None = None


@dataclass
class FailureTally:
    """How often rewards have failed, of how many completions: by (name, reason), and each one's first failure."""

    asked: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def __add__(self, other: "FailureTally") -> "FailureTally":
        return FailureTally(self.asked + other.asked, self.counts + other.counts, other.first | self.first)

    def add(self, name: str, failure: Failure, task: Task) -> None:
        """Count one."""
        self.counts[name, failure.reason] += 1
        prompt = task.prompt if isinstance(task.prompt, str) else str(task.prompt)
        self.first.setdefault(
            name, f"{failure.text.rstrip()}\non the prompt {prompt[-500:]!r}, completion {str(task.completion)[:500]!r}"
        )

    def fraction(self, name: str) -> float:
        """The share of the completions that a reward has failed on."""
        failed = sum(count for (failing, _), count in self.counts.items() if failing == name)
        return failed / max(self.asked, 1)

    def descriptions(self) -> Iterator[tuple[str, str]]:
        """Each failing reward, and in words how often and how it has failed."""
        for name, first in self.first.items():
            reasons = ", ".join(f"{reason} {count}" for (own, reason), count in self.counts.items() if own == name)
            share = f"on {self.fraction(name):.1%} of {self.asked} completions ({reasons})"
            yield name, f"The reward {name} has failed {share}. The first time:\n{first}"

    def check(self, max_failed_fraction: float) -> None:
        """Raise RewardError where a reward has failed more often than that."""
        for name, description in self.descriptions():
            if self.fraction(name) > max_failed_fraction:
                raise RewardError(
                    f"{description}\nThat is more than reward_settings.max_failed_fraction={max_failed_fraction:g} "
                    "allows: mend the reward, or raise it."
                )

    def report(self, max_failed_fraction: float, guard: Guard) -> None:
        """RewardError where a reward has failed more often than that, else a warning of each that has."""
        self.check(max_failed_fraction)
        for name, description in self.descriptions():
            guard.say(f"reward {name}", description)


MAX_WORKERS = 8
SLOW = 5.0  # seconds without a progress bar


class Rewards:
    """The rewards of a run, asked together.

    Args:
        rewards: one, or several.
        settings: their weights, and how they are run.

    Raises:
        ValueError: names that are not unique, or not one weight a reward.
    """

    def __init__(self, rewards: Reward | Sequence[Reward], settings: RewardSettings = RewardSettings()) -> None:
        functions = list(rewards) if isinstance(rewards, Sequence) else [rewards]
        names = [reward_name(reward) for reward in functions]
        if not functions:
            raise ValueError("model.reward is an empty list: name a reward, or leave it out.")
        if len(set(names)) < len(names):
            raise ValueError(
                f"Rewards need different names, got {names}: give them a `name` (argument or attribute), such as "
                "reward.name = 'strict', which functions and functools.partial take too."
            )
        weights = settings.weights if settings.weights is not None else [1.0] * len(names)
        if len(weights) != len(names) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"reward_settings.weights must be one number for each of {names}, got {weights}.")
        self.settings = settings
        self.functions = dict(zip(names, functions, strict=True))
        self.weights = dict(zip(names, weights, strict=True))
        self._async = {name for name, reward in self.functions.items() if is_async(reward)}
        self._wanting_ids = {name for name, reward in self.functions.items() if wants_token_ids(reward)}
        self._fitting: set[frozenset[str]] = set()  # columns that have been checked
        self.shows_progress = False
        self.ranks_here = 1  # which share this machine's cores
        self._pool: RewardPool | None = None

    def start(self) -> None:
        """Start the workers, if any reward needs them, in the background."""
        count = self.settings.num_workers
        count = default_num_workers(self.ranks_here) if count is None else count
        remote = {
            name: reward
            for name, reward in self.functions.items()
            if name not in self._async and not getattr(reward, "in_process", False)
        }
        if self._pool is None and remote and count:
            self._pool = RewardPool(remote, count, self.settings.timeout)
        if self._pool is not None:
            self._pool.start()

    def wait_until_loaded(self) -> None:
        """RewardContractError where a worker can't load its rewards."""
        if self._pool is not None:
            self._pool.wait_until_loaded()

    def close(self) -> None:
        """End the workers; a later call starts others."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def place(self, device: Any, *, ranks_here: int = 1, shows_progress: bool = False) -> None:
        """Tell rewards with a model, which have a method `to`, where the policy is; its ranks share this machine."""
        self.ranks_here, self.shows_progress = ranks_here, shows_progress
        for reward in self.functions.values():
            if callable(getattr(reward, "to", None)):
                reward.to(device)  # type: ignore[attr-defined]

    def check_columns(self, columns: set[str]) -> None:
        """ValueError where a reward's arguments and the dataset's columns do not fit."""
        if columns not in self._fitting:
            for reward in self.functions.values():
                check_reward_columns(reward, columns)
            self._fitting.add(frozenset(columns))

    def check_row(self, row: Mapping[str, Any]) -> None:
        """ValueError where a reward that has a `check_row` says that the row lacks what it needs, such as an answer."""
        for reward in self.functions.values():
            if hasattr(reward, "check_row"):
                reward.check_row(row)

    def needed_columns(self, row: Mapping[str, Any]) -> list[str]:
        """Those of the row's columns that a reward can't do without, and its `answer`."""
        needed = {"answer"}.union(*map(needed_columns, self.functions.values()))
        return [name for name in reward_columns(row) if name in needed]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: dict[str, list[Any]],
        token_ids: Sequence[list[int]] | None = None,
        seed: int = 0,
    ) -> tuple[list[Rewarded], FailureTally]:
        """The completions' rewards, in their order; `columns` and `token_ids` have one entry a completion.

        `seed`: what Python's and numpy's global random numbers are drawn from, for each completion and reward anew.

        Raises:
            ValueError: a column that a reward needs is missing.
            RewardContractError: an answer that is no list of rewards.
        """
        self.check_columns(set(columns))
        with_ids = columns if token_ids is None else columns | {TOKEN_IDS: list(token_ids)}
        tasks = {
            name: self._tasks(name, prompts, completions, with_ids if name in self._wanting_ids else columns, seed)
            for name in self.functions
        }
        values = self._values(tasks)
        tally = FailureTally(asked=len(completions))
        rewarded = []
        for row in range(len(completions)):
            own = {name: values[name][row] for name in self.functions}
            for name, value in own.items():
                if isinstance(value, Failure):
                    tally.add(name, value, tasks[name][row])
            rewarded.append(self._joined(own))
        return rewarded, tally

    def _tasks(
        self, name: str, prompts: Sequence[Any], completions: Sequence[str], columns: dict[str, list[Any]], seed: int
    ) -> list[Task]:
        takes_text = not self.settings.conversational or getattr(self.functions[name], "takes_text", False)
        tasks = []
        for number, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
            is_text = takes_text or isinstance(prompt, str)
            completion = text if is_text else [{"role": "assistant", "content": text}]
            row = {column: values[number] for column, values in columns.items()}
            tasks.append(Task(name, prompt, completion, row, derive_seed(seed, "reward", name, number)))
        return tasks

    def _values(self, tasks: dict[str, list[Task]]) -> dict[str, list[Value]]:
        """Those in workers first and all together, then one after the other."""
        self.start()
        values: dict[str, list[Value]] = {}
        if self._pool is not None:
            names = list(self._pool.rewards)
            asked = [task for name in names for task in tasks[name]]
            with self._bar("rewards", len(asked)) as bar:
                answers = iter(self._pool.run(asked, bar.update))
            values = {name: [next(answers) for _ in tasks[name]] for name in names}
        for name, reward in self.functions.items():
            if name in values:
                continue
            with self._bar(name, len(tasks[name])) as bar:
                if name in self._async:
                    values[name] = reward_concurrently(reward, tasks[name], self.settings, bar.update)
                else:
                    values[name] = _in_process(name, reward, tasks[name], bar.update)
        return values

    def _bar(self, name: str, total: int) -> Any:
        """On stderr, of what takes long."""
        return tqdm(total=total, desc=name, leave=False, delay=SLOW, disable=not self.shows_progress)

    def _joined(self, values: dict[str, Value]) -> Rewarded:
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        failures = [value.reason for value in values.values() if isinstance(value, Failure)]
        total = sum(self.weights[name] * value for name, value in numbers.items())
        return Rewarded(
            total if numbers and not failures else math.nan,
            {name: numbers.get(name, math.nan) for name in values},
            failures[0] if failures else None,
        )


def _in_process(name: str, reward: Any, tasks: list[Task], advance: Callable[[int], object]) -> list[Value]:
    if not tasks:
        return []
    if hasattr(reward, "track"):  # it tells of completions that are done
        reward.track(advance)
    columns = {column: [task.columns[column] for task in tasks] for column in tasks[0].columns}
    with _drawing_from(tasks[0].seed):
        return reward_all_at_once(name, reward, [t.prompt for t in tasks], [t.completion for t in tasks], columns)


@contextmanager
def _drawing_from(seed: int) -> Iterator[None]:
    """Python's and numpy's global random numbers start from `seed` inside; after it the run's own go on."""
    states = random.getstate(), numpy.random.get_state()
    seed_globals(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def default_num_workers(ranks_here: int) -> int:
    """One for each core that this rank may use, 8 at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_WORKERS, cores // ranks_here))
