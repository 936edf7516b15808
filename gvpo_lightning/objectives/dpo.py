"""Direct preference optimization on all pairs of a group: TRL's "sigmoid" loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import GroupObjective, UpdateTerms


def dpo_pairs(rewards: Tensor, group_ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a group's kept completions with R_i > R_j: rows i, rows j, and how many the pair's group has."""
    rewards = rewards.masked_fill(~kept, torch.nan)  # which is neither more nor less
    order = group_ids.argsort(stable=True)
    sizes = group_ids[order].unique_consecutive(return_counts=True)[1]
    better, worse, counts = [order[:0]], [order[:0]], [order[:0]]
    for rows in order.split(sizes.tolist()):
        i, j = (rewards[rows][:, None] > rewards[rows]).nonzero(as_tuple=True)
        better.append(rows[i])
        worse.append(rows[j])
        counts.append(torch.full_like(i, len(i)))
    return torch.cat(better), torch.cat(worse), torch.cat(counts)


def dpo_loss(
    log_ratios: Tensor, rewards: Tensor, group_ids: Tensor, kept: Tensor, *, beta: float, denominator: float
) -> Tensor:
    """DPO's loss: the mean of -log sigmoid(beta (l_i - l_j)) over a group's pairs, summed over groups.

    Args:
        log_ratios, rewards, group_ids, kept: (S,), whole groups.
        denominator: the update's groups that have a pair.
    """
    better, worse, counts = dpo_pairs(rewards, group_ids, kept)
    return -(F.logsigmoid(beta * (log_ratios[better] - log_ratios[worse])) / counts).sum() / denominator


class DPO(GroupObjective):
    """Direct preference optimization on all pairs of a group whose rewards differ."""

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the number of groups that have a pair."""
        better, _, _ = dpo_pairs(batch.rewards, batch.group_ids, batch.kept)
        num_groups = len(batch.group_ids[better].unique())
        return UpdateTerms(torch.zeros(len(batch), dtype=torch.float64), num_groups)

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Over the pairs."""
        columns = (batch.rewards, batch.group_ids, batch.kept)
        return dpo_loss(log_ratios, *columns, beta=self.beta, denominator=max(terms.denominator, 1))
