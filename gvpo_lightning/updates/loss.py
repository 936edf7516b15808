"""The loss of an update's micro-batches, for every objective: fused with the head, of known coefficients, or neither.

GVPO's is fused. Of the others, those that couple groups have known coefficients where groups are cut, and all else
is a loss of token log-probs, which are differentiable without the logits.

A completion's gradient in GVPO is beta d_i / (n (k - 1)) times that of its log-prob, and d_i holds the mean over its
whole group. Where a group's completions are in several micro-batches or ranks, a first pass without gradient computes
all log-ratios, under the weights that the update starts from, and the ranks exchange them; after that every completion
can be trained on its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_kernels import gvpo_loss_of_log_ratios
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.guard import Guard
from gvpo_lightning.objectives.base import GroupObjective, Objective, ObjectiveLoss, UpdateTerms
from gvpo_lightning.policy.head import Scoring, completion_logprobs, completion_loss
from gvpo_lightning.rollout.plan import Update
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.updates.meters import CollectedUpdate, scatter


@dataclass(frozen=True)
class MicroBatchLoss:
    """The loss of one micro-batch, its share of the update's.

    Attributes:
        loss: scalar, differentiable in the weights.
        token_logprobs: (N,) packed, detached.
        log_ratios: (S,) log pi - log pi' in nats, detached.
        entropies: (N,), or of a cut update None.
        shares: what adds up to the objective's own loss and clipped ratios; None: they come from the log-ratios.
    """

    loss: Tensor
    token_logprobs: Tensor
    log_ratios: Tensor
    entropies: Tensor | None
    shares: ObjectiveLoss | None = None


@dataclass(frozen=True)
class UpdateRules:
    """What all updates of a fit share; one with a log-ratio beyond `max_log_ratio` is skipped."""

    objective: Objective
    scoring: Scoring
    placement: Placement
    max_log_ratio: float
    guard: Guard


class UpdateLoss:
    """One update's loss on this rank, micro-batch by micro-batch; the first pass of two is made where this is.

    `counts`: anything in the update does.
    """

    def __init__(self, policy: Any, update: Update, rollout: Rollout, rules: UpdateRules) -> None:
        self.policy, self.update, self.rollout, self.rules = policy, update, rollout, rules
        self.objective, self.device = rules.objective, rules.placement.device
        self.positions = update.positions
        self.terms: UpdateTerms | None = None
        if not self.objective.is_fused:
            self.terms = self.objective.terms(rollout.micro_batch(update.rows, torch.device("cpu")))
        self.coefficients: list[Tensor] | None = None  # of a cut update's micro-batches
        self.entropies: list[Tensor] = []
        self.needs_two_passes = update.is_cut and self.objective.couples_groups
        self.counts = update.num_groups > 0 and (self.terms is None or self.terms.denominator > 0)
        if self.needs_two_passes:
            self.coefficients = self._first_pass()

    def micro_batch(self, slot: int) -> MicroBatchLoss:
        """The loss of the micro-batch `slot`."""
        part, scoring = self.rollout.micro_batch(self.update.micro_batches[slot], self.device), self.rules.scoring
        if self.objective.is_fused or self.coefficients:
            result = completion_loss(
                self.policy,
                part,
                self.objective.beta,
                scoring,
                num_groups=max(self.update.num_groups, 1),
                sequence_coefficients=self.coefficients[slot] if self.coefficients else None,
            )
            entropies = self.entropies[slot] if self.coefficients else result.entropies
            return MicroBatchLoss(result.loss, result.token_logprobs, result.log_ratios, entropies)
        assert self.terms is not None
        logprobs, all_entropies = completion_logprobs(self.policy, part, scoring, return_entropy=True)
        assert all_entropies is not None
        shares = self.objective.loss(logprobs, part, self.terms.select(self.positions[slot]))
        return MicroBatchLoss(
            shares.loss,
            logprobs.detach()[part.completion_mask],
            _log_ratios(logprobs.detach(), part),
            all_entropies[part.completion_mask],
            shares,
        )

    def metrics(self, collected: CollectedUpdate) -> dict[str, float]:
        """The objective's own, by their logged names; nothing of GVPO, whose loss is among all objectives' metrics."""
        if self.terms is None:
            return {}
        if isinstance(self.objective, GroupObjective):
            batch = self.rollout.micro_batch(self.update.rows, torch.device("cpu"))
            ratios = collected.log_ratios.double() if self.update.rows else torch.zeros(len(batch))
            return {"loss": float(self.objective.sequence_loss(ratios, batch, self.terms))}
        metrics = {"loss": collected.loss}
        if self.terms.num_ratios:
            metrics["objective/clip_fraction"] = collected.num_clipped / self.terms.num_ratios
        return metrics

    def _first_pass(self) -> list[Tensor]:
        """dL / d log pi(y_i|x) of this rank's completions, by micro-batch."""
        update, rules, device = self.update, self.rules, self.device
        batches = [self.rollout.micro_batch(rows, device) for rows in update.micro_batches]
        parts, self.entropies = first_pass(self.policy, batches, rules.scoring)
        positions, rows, objective, terms = self.positions, list(update.rows), self.objective, self.terms
        log_ratios = rules.placement.ranks.sum(scatter(parts, positions, len(rows)))
        if terms is None:
            coefficients = sequence_coefficients(
                log_ratios,
                self.rollout.batch.rewards[rows].to(device),
                self.rollout.batch.group_ids[rows].to(device),
                objective.beta,
                num_groups=max(update.num_groups, 1),
                max_log_ratio=rules.max_log_ratio,
            )
        else:
            assert isinstance(objective, GroupObjective)
            batch = self.rollout.micro_batch(rows, device)
            coefficients = coefficients_of(
                log_ratios, lambda ratios: objective.sequence_loss(ratios, batch, terms), rules.max_log_ratio
            )
        zero = coefficients.new_zeros(1)  # of the dropped completion in an empty micro-batch
        return [coefficients[list(where)] if where else zero for where in positions]


def _log_ratios(token_logprobs: Tensor, batch: CompletionBatch) -> Tensor:
    # per token, then the sum: two large sums subtracted would lose what the loss is made of
    return (token_logprobs - batch.reference_logprobs.to(token_logprobs.dtype)).sum(dim=1)


def first_pass(
    model: PreTrainedModel, parts: Sequence[CompletionBatch], scoring: Scoring
) -> tuple[list[Tensor], list[Tensor]]:
    """For each micro-batch its (S,) log-ratios and its (N,) entropies, without gradient."""
    log_ratios, entropies = [], []
    with torch.no_grad():
        for part in parts:
            logprobs, part_entropies = completion_logprobs(model, part, scoring, return_entropy=True)
            assert part_entropies is not None
            log_ratios.append(_log_ratios(logprobs, part))
            entropies.append(part_entropies[part.completion_mask])
    return log_ratios, entropies


def sequence_coefficients(
    log_ratios: Tensor, rewards: Tensor, group_ids: Tensor, beta: float, *, num_groups: int, max_log_ratio: float
) -> Tensor:
    """dL / d log pi(y_i|x) of every completion of an update; all are 0 if a log-ratio is beyond the limit.

    Args:
        log_ratios, rewards, group_ids: (S,) of the whole update, over all its micro-batches and ranks.
        num_groups: the loss's denominator.
        max_log_ratio: the largest absolute one; such an update will be skipped.
    """

    def loss(ratios: Tensor) -> Tensor:
        kept = torch.ones_like(ratios, dtype=torch.bool)
        return gvpo_loss_of_log_ratios(ratios, kept, rewards, group_ids, beta, num_groups=num_groups).loss

    return coefficients_of(log_ratios, loss, max_log_ratio)


def coefficients_of(log_ratios: Tensor, loss: Callable[[Tensor], Tensor], max_log_ratio: float) -> Tensor:
    """The gradient of a loss of log-ratios, any shape; all are 0 if a log-ratio is beyond the limit."""
    usable = (log_ratios.abs() <= max_log_ratio).all()
    ratios = torch.where(usable, log_ratios, torch.zeros_like(log_ratios)).detach().requires_grad_()
    with torch.enable_grad():
        (coefficients,) = torch.autograd.grad(loss(ratios), ratios)
    return torch.where(usable, coefficients, torch.zeros_like(coefficients))
