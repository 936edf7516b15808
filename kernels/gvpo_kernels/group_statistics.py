"""Sizes and means of groups of completions, on one rank or over several."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GroupStatistics:
    """What a completion must know of its group; once it is known, a group may be cut into pieces.

    Attributes:
        index: (S,) row of each completion's group in the (G,) tensors below.
        size: (G,) number of kept completions, k. 0 or 1 means that the group contributes nothing.
        mean_log_ratio: (G,) mean log-ratio of the kept completions, in nats.
        mean_reward: (G,) mean reward of the kept completions.
        mean_logprob: (G,) mean sequence log-prob under the policy, in nats (the RL view alone needs it).
        reward_range: (G,) largest minus smallest reward of the kept completions: exactly 0 where all are equal.
    """

    index: Tensor
    size: Tensor
    mean_log_ratio: Tensor
    mean_reward: Tensor
    mean_logprob: Tensor
    reward_range: Tensor

    @property
    def num_groups(self) -> int:
        """Groups that count: those with two or more kept completions."""
        return int((self.size >= 2).sum())

    def weight(self, kept: Tensor) -> Tensor:
        """(S,) 1 / (k - 1) for the kept completions of groups with k >= 2, else 0."""
        size = self.size[self.index]
        weight = 1.0 / (size - 1).clamp(min=1).to(self.mean_reward.dtype)
        return torch.where(kept & (size >= 2), weight, torch.zeros_like(weight))


def group_statistics(
    log_ratios: Tensor,
    rewards: Tensor,
    sequence_logprobs: Tensor,
    group_ids: Tensor,
    kept: Tensor,
    process_group: "dist.ProcessGroup | None" = None,
) -> GroupStatistics:
    """Sizes and means of every group; without gradient, which changes nothing since residuals sum to 0.

    Args:
        log_ratios, rewards, sequence_logprobs: (S,) floating; values of completions that are not kept are ignored.
        group_ids: (S,) integers in any order; equal ids are one group.
        kept: (S,) bool.
        process_group: if given, groups may be spread over its ranks (ids must agree between them); every
            rank must make this call. Differing S are allowed.
    """
    with torch.no_grad():
        num_local = len(group_ids)
        columns = [group_ids.to(torch.int64), kept, log_ratios, rewards.to(log_ratios.dtype), sequence_logprobs]
        offset = 0
        if process_group is not None:
            columns, offset = gather_rows(columns, process_group)
        ids, kept, *values = columns
        unique, index = torch.unique(ids, return_inverse=True)
        zeros = values[0].new_zeros(len(unique))
        size = torch.zeros_like(zeros, dtype=torch.int64).index_add_(0, index, kept.to(torch.int64))
        divisor = size.clamp(min=1).to(zeros.dtype)
        means = [zeros.index_add(0, index, torch.where(kept, v, torch.zeros_like(v))) / divisor for v in values]
        highest, lowest = (
            zeros.scatter_reduce(0, index[kept], values[1][kept], extreme, include_self=False)
            for extreme in ("amax", "amin")
        )
        means_and_range = (*means, highest - lowest)
        return GroupStatistics(index[offset : offset + num_local], size, *means_and_range)


def reward_statistics(rewards: Tensor, group_ids: Tensor, kept: Tensor) -> GroupStatistics:
    """The same of rewards, or of whatever else completions have one number of, alone: (S,) each; the rest is 0."""
    zeros = torch.zeros_like(rewards)
    return group_statistics(zeros, rewards, zeros, group_ids, kept)


def gather_rows(columns: list[Tensor], process_group: "dist.ProcessGroup") -> tuple[list[Tensor], int]:
    """Concatenate (S_rank,) tensors over the ranks; also the row at which this rank's own part starts."""
    rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    lengths = [torch.zeros(1, dtype=torch.int64, device=columns[0].device) for _ in range(world_size)]
    dist.all_gather(lengths, torch.full_like(lengths[0], len(columns[0])), group=process_group)
    counts = [int(length) for length in lengths]
    gathered = []
    for column in columns:
        padded = column.new_zeros(max(counts))
        padded[: len(column)] = column
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=process_group)
        gathered.append(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]))
    return gathered, sum(counts[:rank])
