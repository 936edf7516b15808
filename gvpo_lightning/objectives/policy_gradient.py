"""The policy gradient with a KL penalty and a leave-one-out baseline: RLOO, as in TRL."""

import torch
from torch import Tensor

from gvpo_kernels import reward_statistics
from gvpo_kernels.reference import sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import Objective, ObjectiveLoss, UpdateTerms
from gvpo_lightning.objectives.grpo import clipped_losses


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
