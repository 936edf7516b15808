"""The objectives that a run can train: the loss of a micro-batch, and what it must know of the whole update.

A micro-batch's loss is its share of the update's, so that the same completions give the same gradient however they
are cut into micro-batches and ranks. Rewards, lengths and log-probs that do not change are known to all ranks, and
with them advantages and denominators (`terms`). Where a completion's gradient depends on the others' current
log-probs (`couples_groups`), groups that are cut need the pass without gradient of `two_passes`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels import group_statistics
from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.objective_settings import CLIPPING, ObjectiveSettings
from gvpo_lightning.objectives import (
    ObjectiveLoss,
    dpo_loss,
    dpo_pairs,
    group_advantages,
    grpo_loss,
    gvpo_loss,
    gvpo_rl_loss,
    leave_one_out_advantages,
    length_scaled_gvpo_loss,
    policy_gradient_loss,
    sft_loss,
)


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
    """A loss of whole groups, in which completions enter by their log-ratios alone. This one is GVPO's."""

    couples_groups = True
    is_fused = True

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the number of groups that count."""
        statistics = group_statistics(batch.rewards, batch.rewards, batch.rewards, batch.group_ids, batch.kept)
        return UpdateTerms(torch.zeros(len(batch), dtype=torch.float64), statistics.num_groups)

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """That of the log-ratios, of groups that are whole."""
        log_ratios = sum_completion_tokens(
            token_logprobs - batch.reference_logprobs.to(token_logprobs.dtype), batch.completion_mask
        )
        loss = self.sequence_loss(log_ratios, batch, terms)
        return ObjectiveLoss(loss, torch.zeros_like(loss.detach()))

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Scalar loss of (S,) log-ratios, of groups that are whole."""
        ratios = log_ratios[:, None]  # a completion as one token: the loss needs nothing else of it
        columns = (torch.zeros_like(ratios), batch.kept[:, None], batch.rewards, batch.group_ids, self.beta)
        return gvpo_loss(ratios, *columns, num_groups=max(int(terms.denominator), 1)).loss


class AblatedGVPO(GroupObjective):
    """GVPO without one or both of its regularisers."""

    is_fused = False

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """The terms that are left."""
        reference = sum_completion_tokens(batch.reference_logprobs, batch.completion_mask).to(log_ratios.dtype)
        settings = self.settings
        assert settings.variance_term is not None
        assert settings.covariance_term is not None
        return gvpo_rl_loss(
            (log_ratios + reference)[:, None],
            reference[:, None],
            batch.kept[:, None],
            batch.rewards,
            batch.group_ids,
            self.beta,
            num_groups=max(int(terms.denominator), 1),
            variance_term=settings.variance_term,
            covariance_term=settings.covariance_term,
        ).loss


class LengthScaledGVPO(GroupObjective):
    """GVPO with log-ratios divided by a power of the completion's length."""

    is_fused = False

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Lengths in tokens."""
        assert self.settings.length_exponent is not None
        scales = batch.lengths.clamp(min=1).to(log_ratios.dtype).pow(-self.settings.length_exponent)
        columns = (scales, batch.kept, batch.rewards, batch.group_ids, self.beta)
        return length_scaled_gvpo_loss(log_ratios, *columns, num_groups=max(int(terms.denominator), 1)).loss


class DPO(GroupObjective):
    """Direct preference optimization on all pairs of a group whose rewards differ."""

    is_fused = False

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the number of groups that have a pair."""
        better, _, _ = dpo_pairs(batch.rewards, batch.group_ids, batch.kept)
        num_groups = len(batch.group_ids[better].unique())
        return UpdateTerms(torch.zeros(len(batch), dtype=torch.float64), num_groups)

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Over the pairs."""
        columns = (batch.rewards, batch.group_ids, batch.kept)
        return dpo_loss(log_ratios, *columns, beta=self.beta, denominator=max(terms.denominator, 1))


class GRPO(Objective):
    """GRPO, or without its two divisions Dr. GRPO."""

    needs_sampler_logprobs = True

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the number of completions."""
        columns = (batch.rewards.double(), batch.group_ids, batch.kept)
        advantages = group_advantages(*columns, divide_by_std=self.settings.kind == "grpo")
        return UpdateTerms(advantages, int(batch.kept.sum()), int(batch.lengths.sum()))

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """Ratios are the tokens'."""
        assert batch.sampler_logprobs is not None
        assert self.settings.clip is not None
        return grpo_loss(
            token_logprobs,
            batch.sampler_logprobs,
            batch.reference_logprobs,
            batch.completion_mask,
            terms.advantages.to(token_logprobs),
            beta=self.beta,
            clip=self.settings.clip,
            denominator=max(terms.denominator, 1),
            max_completion_tokens=None if self.settings.kind == "grpo" else self.max_completion_tokens,
        )


class PolicyGradient(Objective):
    """The gradient of E[R] - beta KL(policy || reference), with a leave-one-out baseline."""

    needs_sampler_logprobs = True

    def check_reference(self, kind: str) -> None:
        """It must not be the policy that has sampled: the penalty is that of the samples, at the rollout's start."""
        if kind == "previous" and self.beta:
            raise ValueError(
                f"objective: policy_gradient with reference: previous and beta={self.beta}: its penalty is that of the "
                "policy at the rollout's start, which is the reference, so it is always 0. Set reference: frozen, or "
                "beta: 0."
            )

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The penalty is part of the reward; the denominator is the number of completions."""
        assert batch.sampler_logprobs is not None
        to_reference = batch.sampler_logprobs.double() - batch.reference_logprobs.double()
        penalty = self.beta * sum_completion_tokens(to_reference, batch.completion_mask)
        advantages = leave_one_out_advantages(batch.rewards.double() - penalty, batch.group_ids, batch.kept)
        count = int(batch.kept.sum())
        return UpdateTerms(advantages, count, count)

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """Ratios are the completions'."""
        assert batch.sampler_logprobs is not None
        assert self.settings.clip is not None
        return policy_gradient_loss(
            token_logprobs,
            batch.sampler_logprobs,
            batch.completion_mask,
            terms.advantages.to(token_logprobs),
            clip=self.settings.clip,
            denominator=max(terms.denominator, 1),
        )


class SFT(Objective):
    """Likelihood of the completions, weighted with their rewards; beta plays no part in it."""

    def check_rewards(self, batch: CompletionBatch) -> None:
        """They must not be negative."""
        rewards = batch.rewards[batch.kept]
        if bool((rewards < 0).any()):
            raise ValueError(
                f"objective: sft weights completions with their rewards, which must be >= 0, got {float(rewards.min())}"
                ": shift the reward, such as to 0 for wrong and 1 for right."
            )

    def terms(self, batch: CompletionBatch) -> UpdateTerms:
        """The denominator is the weighted number of tokens."""
        weights = torch.where(batch.kept, batch.rewards, 0.0).double()
        return UpdateTerms(weights, float((weights * batch.lengths).sum()))

    def loss(self, token_logprobs: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> ObjectiveLoss:
        """With rewards for advantages."""
        weights = terms.advantages.to(token_logprobs)
        loss = sft_loss(token_logprobs, batch.completion_mask, weights, denominator=terms.denominator or 1.0)
        return ObjectiveLoss(loss, torch.zeros_like(loss.detach()))


def make_objective(settings: ObjectiveSettings, beta: float, max_completion_tokens: int) -> Objective:
    """The objective of these settings.

    Raises:
        ValueError: a beta that it can't be trained with.
    """
    can_be_zero = settings.kind in (*CLIPPING, "sft")
    if not (beta > 0 or (beta == 0 and can_be_zero)):
        raise ValueError(f"beta must be > 0{' or 0, without a pull,' if can_be_zero else ''}, got {beta}.")
    kinds: dict[str, type[Objective]] = {
        "gvpo": GroupObjective,
        "grpo": GRPO,
        "dr_grpo": GRPO,
        "policy_gradient": PolicyGradient,
        "dpo": DPO,
        "sft": SFT,
    }
    kind = kinds[settings.kind]
    if not settings.is_whole:
        kind = AblatedGVPO
    elif settings.length_exponent:
        kind = LengthScaledGVPO
    return kind(settings, beta, max_completion_tokens)
