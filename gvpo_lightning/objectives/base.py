"""The objectives that a run can train: the loss of a micro-batch, and what it must know of the whole update.

A micro-batch's loss is its share of the update's, so that the same completions give the same gradient however they
are cut into micro-batches and ranks. Rewards, lengths and log-probs that do not change are known to all ranks, and
with them advantages and denominators (`terms`). Where a completion's gradient depends on the others' current
log-probs (`couples_groups`), groups that are cut need the pass without gradient of `updates.loss`.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gvpo_kernels import reward_statistics
from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.settings import ObjectiveSettings


class ObjectiveLoss(NamedTuple):
    """A scalar loss, differentiable in the token log-probs; and how many ratios clipping took out of it, detached."""

    loss: Tensor
    num_clipped: Tensor


@dataclass(frozen=True)
class UpdateTerms:
    """What every completion's loss needs of the whole update.

    Attributes:
        advantages: (S,) float64 of its completions, as the objective takes them.
        denominator: what the sum of the completions' losses is divided by; 0 = nothing in it counts.
        num_ratios: how many ratios may be clipped.
    """

    advantages: Tensor
    denominator: float
    num_ratios: int = 0

    def select(self, positions: list[int]) -> "UpdateTerms":
        """Those of some completions; without any, of the dropped one that an empty micro-batch holds."""
        rows = torch.tensor(positions, dtype=torch.int64)
        return replace(self, advantages=self.advantages[rows] if positions else self.advantages.new_zeros(1))


class Objective:
    """A loss of completions that all have their own gradient, given the update's terms.

    Attributes:
        couples_groups: a completion's gradient depends on the current log-probs of its group's others.
        needs_sampler_logprobs: batches must have `sampler_logprobs`, and completions must be the policy's own.
        is_fused: `completion_loss` computes it together with the model's head.
    """

    couples_groups = False
    needs_sampler_logprobs = False
    is_fused = False

    def __init__(self, settings: ObjectiveSettings, beta: float, max_completion_tokens: int) -> None:
        self.settings, self.beta = settings, beta
        self.max_completion_tokens = max_completion_tokens  # that sampling may make

    def check_reference(self, kind: str) -> None:
        """Raise ValueError for a kind of reference against which beta would have no effect."""

    def check_rewards(self, batch: CompletionBatch) -> None:
        """Raise ValueError for rewards that this objective has no meaning for."""

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """Of the whole update's completions, on the CPU."""
        raise NotImplementedError

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """The share that some of the update's completions have in its loss; `token_logprobs` as (S, T)."""
        raise NotImplementedError


class GroupObjective(Objective):
    """A loss of whole groups, in which completions enter by their log-ratios alone."""

    couples_groups = True

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the number of groups that count."""
        num_groups = reward_statistics(batch.rewards, batch.group_ids, batch.kept).num_groups
        return UpdateTerms(torch.zeros(len(batch), dtype=torch.float64), num_groups)

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """That of the log-ratios, of groups that are whole."""
        log_ratios = sum_completion_tokens(
            token_logprobs - batch.reference_logprobs.to(token_logprobs.dtype), batch.completion_mask
        )
        loss = self.sequence_loss(log_ratios, batch, terms)
        return ObjectiveLoss(loss, torch.zeros_like(loss.detach()))

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Scalar loss of (S,) log-ratios, of groups that are whole."""
        raise NotImplementedError
