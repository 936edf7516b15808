"""What rewards say of a completion, and how often they have failed."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from gvpo_lightning.guard import Guard
from gvpo_lightning.rewards.protocol import Failure, RewardError
from gvpo_lightning.rewards.workers.pool import Task


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
            name, f"{failure.text.rstrip()}\non the prompt {prompt[-500:]!r}, completion {task.completion[:500]!r}"
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

    def report(self, max_failed_fraction: float, guard: Guard) -> None:
        """RewardError where a reward has failed more often than that, else a warning of each that has."""
        for name, description in self.descriptions():
            if self.fraction(name) > max_failed_fraction:
                raise RewardError(
                    f"{description}\nThat is more than reward_settings.max_failed_fraction={max_failed_fraction:g} "
                    "allows: mend the reward, or raise it."
                )
        for name, description in self.descriptions():
            guard.say(f"reward {name}", description)
