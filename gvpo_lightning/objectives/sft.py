"""Likelihood of the completions, weighted with their rewards: TRL's nll loss."""

import torch
from torch import Tensor

from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import Objective, ObjectiveLoss, UpdateTerms


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
