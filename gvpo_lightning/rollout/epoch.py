"""`Epoch`: where the epoch at hand began, and the passes over the prompts: part of a run's position."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Epoch:
    """The Trainer's epoch, and the passes over the prompts that rollouts are cut from.

    Both are remembered, since they can't be worked out from the number of micro-batches: earlier epochs may have had
    other lengths, over other prompts.

    Attributes:
        start: micro-batches that were trained before this epoch; None where a checkpoint does not say so.
        length: micro-batches of this epoch; None before it begins.
        num_prompts: prompts in one pass; None before the first rollout is cut from these passes.
        first_rollout: the rollout that these passes began with.
    """

    start: int | None = 0
    length: int | None = None
    num_prompts: int | None = None
    first_rollout: int = 0

    @classmethod
    def of(cls, state: Mapping[str, Any] | None) -> "Epoch":
        """What a checkpoint has of it; earlier versions had nothing, and all epochs had one length."""
        return cls(start=None) if state is None else cls(**state)

    def is_over(self, microstep: int) -> bool:
        """Whether all of it has been trained."""
        return self.length is not None and self.start is not None and microstep >= self.start + self.length

    def is_cut(self, length: int, num_prompts: int) -> bool:
        """Whether it has begun as an epoch of another length, or over another number of prompts."""
        return self.length not in (None, length) or self.num_prompts not in (None, num_prompts)

    def begin(self, microstep: int, length: int, num_prompts: int, rollout: int) -> int:
        """Go on with this epoch, or begin the next one where it is over or can't go on; gives its end.

        Args:
            microstep: micro-batches trained so far.
            length: micro-batches of an epoch now.
            num_prompts: prompts of a pass now; where it is another number, new passes begin with `rollout`.
            rollout: the next one to be collected.
        """
        if self.start is None:
            self.start = microstep - microstep % length
        elif self.length is None or self.is_cut(length, num_prompts) or self.is_over(microstep):
            self.start = microstep
        if self.num_prompts not in (None, num_prompts):
            self.first_rollout = rollout
        self.length, self.num_prompts = length, num_prompts
        return self.start + length

    def find(self, rollout: int, offset: int, prompts_per_rollout: int) -> tuple[int, int]:
        """Where the prompt number `offset` of a rollout is: the number of the pass, and the position in it."""
        assert self.num_prompts is not None, "begin comes first"
        return divmod((rollout - self.first_rollout) * prompts_per_rollout + offset, self.num_prompts)

    def order(self, number: int) -> tuple[int | str, ...]:
        """What the order of the pass with this number is drawn for."""
        return ("prompt order", *((self.first_rollout,) if self.first_rollout else ()), number)
