"""GRPO and Dr. GRPO: TRL's losses of the same names.

As the other baselines', the loss takes the denominator of its mean as an argument: it is the whole update's, of which
the tensors may be a part.
"""

import math

import torch
from torch import Tensor

from gvpo_kernels import reward_statistics
from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import Objective, ObjectiveLoss, UpdateTerms


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
