"""What is logged of a rollout and of an optimizer update, gathered over micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from gvpo_kernels import FusedLoss, group_statistics
from gvpo_kernels.group_statistics import gather_rows
from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.distributed import gather_objects
from gvpo_lightning.guards import coverage_totals, is_negligible
from gvpo_lightning.objectives import gvpo_loss
from gvpo_lightning.rollout.sampling import Rollout, rollout_metrics

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


class UpdateMeter:
    """Collects an update's completions on the device; `compute` empties it, with one pass over (S,) tensors."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.reset()

    def reset(self) -> None:
        """Forget what has been added."""
        self._parts: list[tuple[Tensor, ...]] = []
        self._entropy: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: CompletionBatch, result: FusedLoss) -> None:
        """One micro-batch and its loss."""
        self._parts.append(
            (
                batch.unpack(result.token_logprobs).sum(dim=1),
                batch.reference_logprobs.sum(dim=1),
                batch.kept,
                batch.rewards,
                batch.group_ids,
                batch.source_ids,
            )
        )
        if result.entropies is not None:
            self._entropy.append(result.entropies)

    @torch.no_grad()
    def compute(self, num_groups: int, source_names: Sequence[str]) -> dict[str, Tensor]:
        """The update's metrics by their logged names, over all ranks; every rank must call this."""
        columns = [torch.cat(column) for column in zip(*self._parts, strict=True)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            columns[4] = columns[4] + dist.get_rank() * 2**32  # groups are numbered on each rank
            columns, _ = gather_rows(columns, dist.distributed_c10d._get_default_group())
        sequence, reference, kept, rewards, group_ids, source_ids = columns
        # a completion as one token: for metrics the difference of sums is exact enough
        result = gvpo_loss(
            sequence[:, None], reference[:, None], kept[:, None], rewards, group_ids, self.beta, num_groups=num_groups
        )
        metrics = {"loss": result.loss, **result.metrics}
        del metrics["log_ratio/mean"], metrics["log_ratio/max"]  # by source, below
        for number, name in enumerate(source_names):
            mine = kept & (source_ids == number)
            if bool(mine.any()):
                metrics |= _distribution(f"log_ratio/{name}", result.log_ratios[mine])
                metrics[f"residual/{name}/rms"] = result.residuals[mine].square().mean().sqrt()
        metrics["implicit_reward/spread"] = self.beta * _spread(result.log_ratios, group_ids, kept)
        metrics["reward/spread"] = _spread(rewards, group_ids, kept)
        if self._entropy:
            entropies = torch.cat(self._entropy).double()
            total = torch.stack([entropies.sum(), torch.full_like(entropies.sum(), len(entropies))])
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(total)
            metrics["entropy"] = (total[0] / total[1]).float()
        self.reset()
        return metrics


def _spread(values: Tensor, group_ids: Tensor, kept: Tensor) -> Tensor:
    """The largest difference of (S,) values within one group."""
    return group_statistics(values, values, values, group_ids, kept).reward_range.max()


def _distribution(name: str, log_ratios: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation, largest absolute value and quantiles."""
    values = log_ratios.float()
    quantiles = values.sort().values
    return {
        f"{name}/mean": values.mean(),
        f"{name}/std": values.std(correction=0),
        f"{name}/max": values.abs().max(),
    } | {f"{name}/{label}": quantiles[round(share * (len(values) - 1))] for label, share in QUANTILES.items()}


@dataclass
class CompletionFacts:
    """(S,) facts about the completions of a rollout, of all ranks, on the CPU; names as in `CompletionBatch`."""

    rewards: Tensor
    lengths: Tensor
    kept: Tensor
    truncated: Tensor
    source_ids: Tensor
    negligible: Tensor


def measure_rollout(
    rollout: Rollout, source_names: Sequence[str], vocab_size: int, flat_groups: tuple[int, int]
) -> dict[str, float]:
    """The rollout's metrics by their logged names, over all ranks; every rank must call this.

    `flat_groups`: what `drop_by_settings` has counted.
    `source/<name>/*` are over the completions of one source: `fraction` of all, `kept_fraction` and
    `negligible_fraction` of its own, `reward_mean` and `length_mean` of the kept ones.
    """
    batch = rollout.batch.to("cpu")
    negligible = is_negligible(batch, vocab_size)
    own = [negligible if f.name == "negligible" else getattr(batch, f.name) for f in fields(CompletionFacts)]
    totals = {"group/zero_variance_fraction": flat_groups, **coverage_totals(batch, negligible)}
    ranks = gather_objects((own, totals, rollout.dropped))
    facts = CompletionFacts(*(torch.cat(column) for column in zip(*(columns for columns, _, _ in ranks), strict=True)))
    metrics = rollout_metrics(facts)
    for name in totals:
        sums, counts = zip(*(of_rank[name] for _, of_rank, _ in ranks), strict=True)
        metrics[name] = sum(sums) / max(sum(counts), 1)
    total = max(len(facts.kept), 1)
    for reason in rollout.dropped:
        metrics[f"completion/dropped_{reason}_fraction"] = sum(dropped[reason] for _, _, dropped in ranks) / total
    for number, name in enumerate(source_names):
        mine = facts.source_ids == number
        if bool(mine.any()):
            kept = mine & facts.kept
            metrics |= {
                f"source/{name}/fraction": float(mine.float().mean()),
                f"source/{name}/kept_fraction": float(kept.sum() / mine.sum()),
                f"source/{name}/negligible_fraction": float(facts.negligible[mine].float().mean()),
                f"source/{name}/reward_mean": float(facts.rewards[kept].mean()),
                f"source/{name}/length_mean": float(facts.lengths[kept].float().mean()),
            }
    return metrics
