"""`RewardSettings`: how rewards are weighed, where they run and how much of them may fail."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RewardSettings:
    """How rewards are weighed, where they run and how much of them may fail.

    Attributes:
        weights: one a reward, in their order; default: all 1. A completion's reward is the weighted sum of those
            that apply to it, and it has none where none does.
        num_workers: processes that each rank runs its rewards in; default: one for each core that it may use, 8 at
            most. 0 = in the training process, where nothing can be stopped that hangs.
        timeout: seconds that a reward may take for one completion, in workers and where it is async.
        max_failed_fraction: the run stops where a reward has failed on more than this share of a rollout's
            completions, over all ranks, or of those of a whole validation, test or prediction.
        max_concurrency: completions that an async reward is asked for at once.
        conversational: where a prompt is messages, give rewards the completion as messages too, as TRL does:
            [{"role": "assistant", "content": text}]. Those with the attribute `takes_text = True`, as all that are
            shipped, are given text nevertheless.
    """

    weights: list[float] | None = None
    num_workers: int | None = None
    timeout: float = 30.0
    max_failed_fraction: float = 0.1
    max_concurrency: int = 64
    conversational: bool = False

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"reward_settings.num_workers must be at least 0, got {self.num_workers}.")
        if not self.timeout > 0:
            raise ValueError(f"reward_settings.timeout must be > 0 seconds, got {self.timeout}.")
        if not 0 <= self.max_failed_fraction <= 1:
            raise ValueError(
                f"reward_settings.max_failed_fraction must be from 0 to 1, got {self.max_failed_fraction}."
            )
        if self.max_concurrency < 1:
            raise ValueError(f"reward_settings.max_concurrency must be at least 1, got {self.max_concurrency}.")
