"""`Rollout`: completions of some prompts, sampled or recorded, with text and rewards, and what is logged of them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gvpo_lightning.data.batch import CompletionBatch, dropped_completion
from gvpo_lightning.rewards.protocol import COMPONENT
from gvpo_lightning.rewards.run import FailureTally
from gvpo_lightning.rewards.values import as_json
from gvpo_lightning.rollout.plan import GroupShape


@dataclass
class Rollout:
    """Completions of some prompts: the tensors to train on, and the text behind them.

    Attributes:
        index: counts the rollouts of a run.
        batch: a row a completion, on the CPU; those of one prompt are adjacent, and group ids count the prompts.
        prompts: one entry a group.
        completions, sources, lengths: one entry a row of `batch`; lengths in tokens, of dropped ones too.
        components: for each of the run's rewards, by name, one entry a row; NaN where it does not apply or has failed.
        dropped: how many completions have left their groups, by reason.
        failures: how often rewards have failed, where they were asked; not part of checkpoints.
        metrics: what is logged with every update of the rollout.
    """

    index: int
    batch: CompletionBatch
    prompts: list[Any]
    completions: list[str]
    sources: list[str]
    lengths: list[int]
    components: dict[str, list[float]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    failures: FailureTally = field(default_factory=FailureTally)

    def group_shapes(self) -> list[GroupShape]:
        """The kept completions of each group, for the update plan."""
        kept: list[list[int]] = [[] for _ in self.prompts]
        group_ids = self.batch.group_ids.tolist()
        for row in self.batch.kept.nonzero().squeeze(-1).tolist():
            kept[group_ids[row]].append(row)
        lengths, prompts = self.batch.lengths.tolist(), self.batch.prompt_mask.sum(dim=1).tolist()
        return [
            GroupShape(tuple(rows), prompts[rows[0]] if rows else 0, tuple(lengths[row] for row in rows))
            for rows in kept
        ]

    def micro_batch(self, rows: Sequence[int], device: torch.device) -> CompletionBatch:
        """Some rows of the batch, on `device`; without any, a dropped completion, since ranks must step together."""
        return (self.batch.select(torch.tensor(rows)) if rows else dropped_completion()).to(device)

    def drop(self, marked: Mapping[str, Tensor]) -> None:
        """Take completions out of their groups, and count each under the first reason that marks it, (S,) bool."""
        kept = left = self.batch.kept
        for reason, rows in marked.items():
            self.dropped[reason] = int((rows & left).sum())
            left = left & ~rows
        self.batch.drop(kept & ~left)

    def components_of(self, marked: Tensor) -> dict[str, list[float]]:
        """Of each reward, what it gives the marked completions, (S,) bool, to which it applies."""
        flags = marked.tolist()
        return {
            name: [value for value, is_marked in zip(values, flags, strict=True) if is_marked and value == value]
            for name, values in self.components.items()
        }

    def component_columns(self) -> dict[str, list[float | None]]:
        """`reward/<name>` of several rewards, one entry a row; nothing of a single one, which is `rewards` itself."""
        components = self.components if len(self.components) > 1 else {}
        return {f"{COMPONENT}{name}": _nan_as_none(values) for name, values in components.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One dict a group, in the offline format; rewards are None where there is none."""
        batch = self.batch
        rewards = _nan_as_none(batch.rewards.tolist())
        ids = [row[:n] for row, n in zip(batch.completion_ids.tolist(), self.lengths, strict=True)]
        columns: dict[str, list[Any]] = {
            "completions": self.completions,
            "rewards": rewards,
            "token_ids": ids,
            "truncated": batch.truncated.tolist(),
            "sources": self.sources,
        }
        columns |= self.component_columns()
        groups = batch.group_ids.tolist()
        return [
            {"prompt": prompt}
            | {
                name: [value for value, group in zip(values, groups, strict=True) if group == number]
                for name, values in columns.items()
            }
            for number, prompt in enumerate(self.prompts)
        ]

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and lists alone, so that checkpoints load with weights_only."""
        state = {**vars(self), "batch": self.batch.state_dict(), "prompts": as_json(self.prompts)}
        del state["failures"]
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Rollout":
        """What `state_dict` gave."""
        return cls(**{**state, "batch": CompletionBatch(**state["batch"])})


def _nan_as_none(values: Sequence[float]) -> list[float | None]:
    return [None if value != value else value for value in values]


def component_metrics(rollout: Rollout, kept: Tensor) -> dict[str, float]:
    """`reward/<name>/*`: mean and std over the kept completions to which a reward applies (NaN: to none)."""
    metrics = {}
    for name, values in rollout.components_of(kept).items():
        own = torch.tensor(values)
        metrics[f"reward/{name}/mean"] = float(own.mean())
        metrics[f"reward/{name}/std"] = float(own.std(correction=0)) if len(own) else math.nan
        metrics[f"reward/{name}/failed_fraction"] = rollout.failures.fraction(name)
    return metrics


def rollout_metrics(batch: CompletionBatch, kept: Tensor, all_lengths: Tensor) -> dict[str, float]:
    """`reward/*` and `completion/*` over the completions that have not been dropped; NaN where all were.

    kept, all_lengths: (S,) the batch's own.
    """
    rewards, lengths = batch.rewards[kept].float(), all_lengths[kept].float()
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)) if len(rewards) else math.nan,
        "completion/length_mean": float(lengths.mean()),
        "completion/length_min": float(lengths.min()) if len(lengths) else math.nan,
        "completion/length_max": float(lengths.max()) if len(lengths) else math.nan,
        "completion/truncated_fraction": float(batch.truncated.float().mean()),
        "completion/dropped_fraction": float((~kept).float().mean()),
    }


def measure_rollout(
    rollout: Rollout, source_names: Sequence[str], vocab_size: int, flat_groups: tuple[int, int]
) -> dict[str, float]:
    """The rollout's metrics by their logged names.

    `flat_groups`: what `drop_by_settings` has counted.
    `source/<name>/*` are over the completions of one source: `fraction` of all, `kept_fraction` and
    `negligible_fraction` of its own, `reward_mean` and `length_mean` of the kept ones.
    """
    batch = rollout.batch
    kept, lengths = batch.kept, batch.lengths
    # on average less likely under the reference than a token drawn at random
    mean_logprobs = batch.reference_logprobs.sum(dim=1) / lengths.clamp(min=1)
    negligible = kept & (mean_logprobs < -math.log(vocab_size))
    metrics = rollout_metrics(batch, kept, lengths) | component_metrics(rollout, kept)
    totals = {"group/zero_variance_fraction": flat_groups, **coverage_totals(batch, kept, negligible)}
    for name, (amount, count) in totals.items():
        metrics[name] = amount / max(count, 1)
    for reason, dropped in rollout.dropped.items():
        metrics[f"completion/dropped_{reason}_fraction"] = dropped / max(len(kept), 1)
    for number, name in enumerate(source_names):
        mine = batch.source_ids == number
        if bool(mine.any()):
            own = mine & kept
            metrics |= {
                f"source/{name}/fraction": float(mine.float().mean()),
                f"source/{name}/kept_fraction": float(own.sum() / mine.sum()),
                f"source/{name}/negligible_fraction": float(negligible[mine].float().mean()),
                f"source/{name}/reward_mean": float(batch.rewards[own].mean()),
                f"source/{name}/length_mean": float(lengths[own].float().mean()),
            }
    return metrics


def coverage_totals(batch: CompletionBatch, kept: Tensor, negligible: Tensor) -> dict[str, tuple[float, int]]:
    """How much of the reference's support the groups hold: by logged name, a sum and what it is a mean over.

    `support/coverage` is the reference's probability of a group's distinct completions: what it might have said
    that is in the group. It is small by nature for long completions. `support/distinct_fraction` is the share of a
    group's completions that differ. `support/negligible_fraction` is the share that is `negligible`, of the `kept`.
    """
    coverage: dict[int, dict[tuple[int, ...], float]] = {}
    total = 0
    probabilities = batch.reference_logprobs.double().sum(dim=1).exp().tolist()
    for row in kept.nonzero().squeeze(-1).tolist():
        ids = tuple(batch.completion_ids[row][batch.completion_mask[row]].tolist())
        coverage.setdefault(int(batch.group_ids[row]), {})[ids] = probabilities[row]
        total += 1
    return {
        "support/coverage": (sum(sum(distinct.values()) for distinct in coverage.values()), len(coverage)),
        "support/distinct_fraction": (sum(map(len, coverage.values())), total),
        "support/negligible_fraction": (int(negligible.sum()), total),
    }
