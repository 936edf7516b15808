"""The loss of an update's micro-batches, for every objective: fused with the head, of known coefficients, or neither.

GVPO's is fused. Of the others, those that couple groups have known coefficients where groups are cut, and all else
is a loss of token log-probs, which are differentiable without the logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.guard import Guard
from gvpo_lightning.objectives.base import GroupObjective, Objective, ObjectiveLoss, UpdateTerms
from gvpo_lightning.policy.head import Scoring, completion_logprobs, completion_loss
from gvpo_lightning.rollout.plan import Update
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.updates.meters import CollectedUpdate
from gvpo_lightning.updates.two_passes import coefficients_of, first_pass, scatter, sequence_coefficients


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
    """What all updates of a fit share.

    Attributes:
        objective, scoring, placement: what is minimised, of which log-probs, where.
        max_log_ratio: an update with a log-ratio beyond it is skipped.
        guard: warns of what updates show.
    """

    objective: Objective
    scoring: Scoring
    placement: Placement
    max_log_ratio: float
    guard: Guard


class UpdateLoss:
    """One update's loss on this rank, micro-batch by micro-batch.

    Args:
        policy, update, rollout, rules: groups that are cut are given a pass without gradient here, if the objective
            couples them.

    Attributes:
        needs_two_passes: such a pass comes first.
        counts: anything in the update does.
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
    return (token_logprobs - batch.reference_logprobs.to(token_logprobs.dtype)).sum(dim=1)
