"""What is logged of a rollout."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.rollout.rollout import Rollout


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
