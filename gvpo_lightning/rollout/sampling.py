"""One rollout: completions of some prompts, their text and their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.rewards import Reward, compute_rewards
from gvpo_lightning.rollout.generation import GenerationSettings, encode_prompt, generate_completions
from gvpo_lightning.rollout.loader import Row


@dataclass(frozen=True)
class RolloutSettings:
    """How much is sampled, and how it is cut into optimizer updates.

    Attributes:
        group_size: completions of one prompt; at least 2, since a group's variance is what is trained on.
        prompts_per_rollout: prompts sampled at once, over all ranks; a multiple of prompts_per_update.
        prompts_per_update: prompts in one optimizer update, over all ranks; it is cut into
            `trainer.accumulate_grad_batches` micro-batches of whole groups.
        epochs_per_rollout: times that a rollout is trained on.
        micro_batch_size: the most completions that one micro-batch may hold (checked before training);
            None = as many as the two settings above make.
        truncated: what becomes of completions without an EOS: "keep" with their reward, or "drop", which
            takes them out of their group. Counted either way.
    """

    group_size: int = 8
    prompts_per_rollout: int = 32
    prompts_per_update: int = 8
    epochs_per_rollout: int = 1
    micro_batch_size: int | None = None
    truncated: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size must be at least 2, got {self.group_size}: GVPO compares the completions of "
                "one prompt with each other."
            )
        for name in ("prompts_per_rollout", "prompts_per_update", "epochs_per_rollout"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} must be at least 1, got {getattr(self, name)}.")
        if self.truncated not in ("keep", "drop"):
            raise ValueError(f"rollout.truncated must be 'keep' or 'drop', got {self.truncated!r}.")


@dataclass
class Rollout:
    """Sampled completions: the tensors to train on, and the text behind them.

    `prompts` has one entry a group, `completions` one a row of `batch`; `index` counts the rollouts of a run.
    """

    index: int
    batch: CompletionBatch
    prompts: list[Any]
    completions: list[str]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def group_sizes(self) -> list[int]:
        """Kept completions of each group."""
        return self.batch.kept.view(len(self.prompts), -1).sum(dim=1).tolist()

    def micro_batch(self, groups: Sequence[int]) -> CompletionBatch:
        """The kept completions of some groups; without any, one dropped row, since ranks must step together."""
        wanted = torch.isin(self.batch.group_ids, torch.tensor(groups, device=self.batch.group_ids.device))
        rows = (wanted & self.batch.kept).nonzero().squeeze(-1)
        if len(rows):
            return self.batch.select(rows)
        empty = self.batch.select(torch.zeros_like(self.batch.group_ids[:1]))
        empty.drop(torch.ones_like(empty.kept))
        return empty

    def rows(self) -> list[dict[str, Any]]:
        """One dict a group: `prompt`, `completions`, `rewards` (None where there is none)."""
        rewards = [None if reward != reward else reward for reward in self.batch.rewards.tolist()]
        size = len(self.completions) // len(self.prompts)
        parts = [slice(start, start + size) for start in range(0, len(self.completions), size)]
        return [
            {"prompt": prompt, "completions": self.completions[part], "rewards": rewards[part]}
            for prompt, part in zip(self.prompts, parts, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists alone, so that checkpoints load with weights_only."""
        return {**vars(self), "batch": self.batch.to("cpu").state_dict()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> "Rollout":
        """What `state_dict` gave, on `device`."""
        return cls(**{**state, "batch": CompletionBatch(**state["batch"]).to(device)})


def sample_rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    group_size: int,
    settings: GenerationSettings,
    *,
    seed: int,
    index: int = 0,
) -> Rollout:
    """`group_size` completions for the prompt of each row, without rewards yet."""
    prompts = [row["prompt"] for row in rows]
    token_ids = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    # generation must not leave inference tensors in the model's caches: training would fail on them later
    with torch.inference_mode(False):
        batch = generate_completions(model, tokenizer, token_ids, group_size, settings, seed)
    completions = [
        str(tokenizer.decode(ids[mask], skip_special_tokens=True))
        for ids, mask in zip(batch.completion_ids, batch.completion_mask, strict=True)
    ]
    return Rollout(index, batch, prompts, completions)


def reward_rollout(rollout: Rollout, reward: Reward, rows: Sequence[Row]) -> None:
    """Fill in the rewards; completions whose reward is missing or not finite leave their group."""
    groups = rollout.batch.group_ids.tolist()
    columns = {name: [rows[group][name] for group in groups] for name in (rows[0] if rows else {}) if name != "prompt"}
    values = compute_rewards(reward, [rollout.prompts[group] for group in groups], rollout.completions, columns)
    rollout.batch.rewards = torch.tensor(values, dtype=torch.float32, device=rollout.batch.rewards.device)
    rollout.batch.drop(~torch.isfinite(rollout.batch.rewards))


def rollout_metrics(batch: CompletionBatch) -> dict[str, float]:
    """`reward/*` and `completion/*` over the completions that have not been dropped; NaN where all were."""
    kept = batch.kept
    rewards, lengths = batch.rewards[kept].float(), batch.lengths[kept].float()
    nan = torch.full((), torch.nan)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)) if len(rewards) else float(nan),
        "completion/length_mean": float(lengths.mean()),
        "completion/length_min": float(lengths.min() if len(lengths) else nan),
        "completion/length_max": float(lengths.max() if len(lengths) else nan),
        "completion/truncated_fraction": float(batch.truncated.float().mean()),
        "completion/dropped_fraction": float((~kept).float().mean()),
    }
