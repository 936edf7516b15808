"""What GVPO is compared with: TRL's losses of the same names, and how a run trains with them.

A loss takes the denominator of its mean as an argument: it is the whole update's, of which the tensors may be a part.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from gvpo_kernels import reward_statistics
from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import GroupObjective, Objective, ObjectiveLoss, UpdateTerms


def group_advantages(rewards: Tensor, group_ids: Tensor, kept: Tensor, *, divide_by_std: bool) -> Tensor:
    """(S,) R - mean of the group; GRPO's, with `divide_by_std`, over (sample standard deviation + 1e-4)."""
    statistics = reward_statistics(rewards, group_ids, kept)
    centred = torch.where(kept, rewards - statistics.mean_reward[statistics.index], torch.zeros_like(rewards))
    if not divide_by_std:
        return centred
    squares = torch.zeros_like(statistics.mean_reward).index_add_(0, statistics.index, centred.square())
    std = (squares / (statistics.size - 1).clamp(min=1)).sqrt()
    return centred / (std[statistics.index] + 1e-4)


def grpo_loss(
    token_logprobs: Tensor,
    sampler_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    *,
    beta: float,
    clip: float,
    denominator: float,
    max_completion_tokens: int | None = None,
) -> ObjectiveLoss:
    """GRPO's loss: clipped token ratios to the sampling-time policy, and beta times the k3 estimate of the KL.

    Args:
        token_logprobs, sampler_logprobs, reference_logprobs: (S, T) in nats; completion_mask: (S, T) bool.
        advantages: (S,).
        denominator: completions of the update.
        max_completion_tokens: a completion's tokens are summed and divided by it (Dr. GRPO); None: their mean.
    """
    log_ratio = torch.where(completion_mask, token_logprobs - sampler_logprobs, 0.0)
    token_losses, clipped = clipped_losses(log_ratio, advantages[:, None], clip)
    if beta:
        to_reference = torch.where(completion_mask, reference_logprobs - token_logprobs, 0.0)
        token_losses = token_losses + beta * (to_reference.exp() - to_reference - 1)
    lengths = completion_mask.sum(dim=1).clamp(min=1) if max_completion_tokens is None else max_completion_tokens
    loss = (sum_completion_tokens(token_losses, completion_mask) / lengths).sum() / denominator
    return ObjectiveLoss(loss, (clipped & completion_mask).sum())


def clipped_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), and where the clipped one has been taken; any shape."""
    # with A >= 0 all that is above the bound is clipped or 0, but e^89 would be inf, and its gradient 0 * inf
    beyond = math.log1p(clip) + 1.0
    ratios = torch.where(advantages >= 0, log_ratios.clamp(max=beyond), log_ratios).exp()
    losses = -torch.min(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    clipped = ((ratios < 1 - clip) & (advantages < 0)) | ((ratios > 1 + clip) & (advantages > 0))
    return losses, clipped.detach()


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


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor, kept: Tensor) -> Tensor:
    """(S,) R - mean of the group's others; 0 for a lone completion."""
    statistics = reward_statistics(rewards, group_ids, kept)
    centred = rewards - statistics.mean_reward[statistics.index]
    size = statistics.size[statistics.index]
    return torch.where(kept & (size >= 2), centred * size / (size - 1).clamp(min=1), torch.zeros_like(rewards))


def policy_gradient_loss(
    token_logprobs: Tensor,
    sampler_logprobs: Tensor,
    completion_mask: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    denominator: float,
) -> ObjectiveLoss:
    """The policy gradient's loss: advantages times clipped ratios of whole completions; arguments as in `grpo_loss`."""
    log_ratios = sum_completion_tokens(token_logprobs - sampler_logprobs, completion_mask)
    kept = completion_mask.any(dim=1)
    losses, clipped = clipped_losses(log_ratios, advantages, clip)
    return ObjectiveLoss(torch.where(kept, losses, 0.0).sum() / denominator, (clipped & kept).sum())


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


def sft_loss(token_logprobs: Tensor, completion_mask: Tensor, rewards: Tensor, *, denominator: float) -> Tensor:
    """Negative log-likelihood weighted with the completions' rewards.

    Args:
        token_logprobs, completion_mask: (S, T); rewards: (S,) >= 0, anything for dropped completions.
        denominator: the update's tokens, each weighted with its completion's reward.
    """
    weights = torch.where(completion_mask.any(dim=1), rewards, 0.0)
    return -(weights * sum_completion_tokens(token_logprobs, completion_mask)).sum() / denominator


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
