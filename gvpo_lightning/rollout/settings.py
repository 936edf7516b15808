"""How much is sampled, and how."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RolloutSettings:
    """How much is sampled, and how it is cut into optimizer updates.

    Attributes:
        group_size: completions of one prompt; at least 2, since a group's variance is what is trained on. Groups
            that a file fills are as large as it has them.
        prompts_per_rollout: prompts sampled at once, over all ranks.
        prompts_per_update: the most prompts in one optimizer update, over all ranks; a rollout is cut into as few
            updates as that allows, as equal as can be, and each update into `trainer.accumulate_grad_batches`
            micro-batches. Nothing has to divide anything.
        epochs_per_rollout: times that a rollout is trained on.
        micro_batch_size: the most completions that one micro-batch may hold (checked before training).
        micro_batch_tokens: the most tokens, prompts included and padding too unless the module is `padding_free`, that
            one micro-batch should hold; lengths are only known when they have been sampled, so more is warned of, not
            refused. Where whole groups exceed either limit they are cut, which costs a second forward pass; without
            limits they are cut only where there are more micro-batches than groups.
        truncated: what becomes of completions without an EOS: "keep" with their reward, or "drop", which
            takes them out of their group. Counted either way.
        max_completion_tokens: longer completions from demonstrations or a file are cut, and are then truncated.
        zero_variance: "drop" leaves out groups whose rewards are all equal. That changes the objective: such
            groups have a gradient, towards the reference, as soon as the policy has moved.
    """

    group_size: int = 8
    prompts_per_rollout: int = 32
    prompts_per_update: int = 8
    epochs_per_rollout: int = 1
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    truncated: Literal["keep", "drop"] = "keep"
    max_completion_tokens: int | None = None
    zero_variance: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size must be at least 2, got {self.group_size}: GVPO compares the completions of "
                "one prompt with each other."
            )
        for name in ("prompts_per_rollout", "prompts_per_update", "epochs_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("micro_batch_size", "micro_batch_tokens", "max_completion_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("truncated", "zero_variance"):
            if getattr(self, name) not in ("keep", "drop"):
                raise ValueError(f"rollout.{name} must be 'keep' or 'drop', got {getattr(self, name)!r}.")

    @property
    def updates_per_pass(self) -> int:
        """Optimizer updates that one pass over a rollout makes."""
        return math.ceil(self.prompts_per_rollout / self.prompts_per_update)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates from one rollout to the next."""
        return self.updates_per_pass * self.epochs_per_rollout


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are sampled.

    Attributes:
        max_new_tokens: completions that reach it without an EOS or a stop string are truncated (kept, counted).
        temperature: the sampler's own; log-probs are taken at the module's `temperature`. 0 always takes the
            likeliest token.
        top_k, top_p, min_p: 0, 1.0 and 0.0 sample from the whole distribution. Anything else takes support
            away, as temperature 0 does, and with it GVPO's unique optimum.
        batch_size: completions generated at once; bounds the key-value cache's memory.
        stop_strings: texts that end a completion as an EOS does, such as "</answer>"; they stay in it. What the prompt
            has of them does not count.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    batch_size: int = 256
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, rule, holds in (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", ">= 0", self.temperature >= 0),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("stop_strings", "texts that are not empty", all(self.stop_strings)),
        ):
            if not holds:
                raise ValueError(f"generation.{name} must be {rule}, got {getattr(self, name)}.")
