"""GVPO and the objectives it is compared with, as pure functions: tensors -> loss.

`gvpo_loss` lives in `gvpo_kernels`; its two views are the same objective written as weighted likelihood
(`gvpo_nll_loss`) and as reinforcement learning (`gvpo_rl_loss`). In exact arithmetic all three have
the same gradient, which is what the views are for: to check it, and to read it.

The others are TRL's of the same names: `grpo_loss` (loss_type grpo and dr_grpo), `policy_gradient_loss`
(RLOOTrainer), `dpo_loss` ("sigmoid") and `sft_loss` (nll). Each takes the denominator of its mean as an
argument: it is the whole update's, of which the tensors may be a part.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gvpo_kernels import group_statistics
from gvpo_kernels.reference import (
    GVPOLoss,
    gvpo_loss,
    gvpo_metrics,
    prepare,
    rl_terms,
    sum_completion_tokens,
)

__all__ = [
    "GVPOLoss",
    "ObjectiveLoss",
    "dpo_loss",
    "dpo_pairs",
    "group_advantages",
    "grpo_loss",
    "gvpo_loss",
    "gvpo_nll_loss",
    "gvpo_rl_loss",
    "leave_one_out_advantages",
    "length_scaled_gvpo_loss",
    "policy_gradient_loss",
    "sft_loss",
]


class ObjectiveLoss(NamedTuple):
    """A scalar loss, differentiable in the token log-probs; and how many ratios clipping took out of it, detached."""

    loss: Tensor
    num_clipped: Tensor


def gvpo_nll_loss(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
) -> GVPOLoss:
    """GVPO as a weighted negative log-likelihood; arguments, record and errors as in `gvpo_loss`.

    L = -mean over groups of  beta / (k - 1) sum_i sg[A_i - beta (l_i - mean l)] log pi(y_i|x). Without the
    stop-gradient sg the gradient would be wrong. The gradient is `gvpo_loss`'s; the value is not.
    """
    batch = prepare(token_logprobs, reference_logprobs, completion_mask, rewards, group_ids, beta)
    sequence_logprobs = batch.sequence_logprobs.masked_fill(batch.share == 0, 0.0)  # -inf * 0 would be NaN
    loss = beta * (batch.share * batch.residuals.detach() * sequence_logprobs).sum()
    return GVPOLoss(loss, batch.residuals.detach(), batch.log_ratios.detach(), gvpo_metrics(batch))


def gvpo_rl_loss(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_mask: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    *,
    num_groups: int | None = None,
    variance_term: bool = True,
    covariance_term: bool = True,
) -> GVPOLoss:
    """GVPO as reward maximisation with two regularisers; arguments, record and errors as in `gvpo_loss`.

    The sum of the three `objective/*` metrics: its value differs from `gvpo_loss`'s by a constant of the
    batch, Var(beta log pi' + R) / 2 averaged over the groups. Without one of the regularisers it is another
    objective (the paper's ablation). Without the variance term it is unbounded below. Without the covariance term it is
    at least -Var(R) / 2, and its optimum is exp(R / beta) / Z whatever the reference: where few strings have a reward,
    nearly uniform over all of them.
    """
    batch = prepare(token_logprobs, reference_logprobs, completion_mask, rewards, group_ids, beta, num_groups)
    terms = rl_terms(batch)
    if not variance_term:
        del terms["objective/variance_term"]
    if not covariance_term:
        del terms["objective/covariance_term"]
    loss = sum(terms.values(), start=token_logprobs.new_zeros((), dtype=batch.log_ratios.dtype))
    return GVPOLoss(loss, batch.residuals.detach(), batch.log_ratios.detach(), gvpo_metrics(batch))


def length_scaled_gvpo_loss(
    log_ratios: Tensor,
    scales: Tensor,
    kept: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    *,
    num_groups: int | None = None,
) -> GVPOLoss:
    """GVPO with residuals d_i = beta (f_i l_i - mean f l) - A_i; errors as in `gvpo_loss`.

    Its optimum is pi' exp((R - c) / (beta f)), with the c(x) at which that sums to 1: d = 0 for all responses
    says that beta f l = R - c, and the left side of sum pi = 1 falls strictly in c.

    Args:
        log_ratios, kept, rewards, group_ids: (S,), one entry a completion.
        scales: (S,) f_i > 0, such as the number of tokens to a power.
    """
    implicit = (scales * log_ratios)[:, None]  # as log-ratios of one token they make the loss that GVPO has
    return gvpo_loss(
        implicit, torch.zeros_like(implicit), kept[:, None], rewards, group_ids, beta, num_groups=num_groups
    )


def group_advantages(rewards: Tensor, group_ids: Tensor, kept: Tensor, *, divide_by_std: bool) -> Tensor:
    """(S,) R - mean of the group; GRPO's, with `divide_by_std`, over (sample standard deviation + 1e-4)."""
    statistics = group_statistics(rewards, rewards, rewards, group_ids, kept)
    centred = torch.where(kept, rewards - statistics.mean_reward[statistics.index], torch.zeros_like(rewards))
    if not divide_by_std:
        return centred
    squares = torch.zeros_like(statistics.mean_reward).index_add_(0, statistics.index, centred.square())
    std = (squares / (statistics.size - 1).clamp(min=1)).sqrt()
    return centred / (std[statistics.index] + 1e-4)


def leave_one_out_advantages(rewards: Tensor, group_ids: Tensor, kept: Tensor) -> Tensor:
    """(S,) R - mean of the group's others; 0 for a lone completion."""
    statistics = group_statistics(rewards, rewards, rewards, group_ids, kept)
    centred = rewards - statistics.mean_reward[statistics.index]
    size = statistics.size[statistics.index]
    return torch.where(kept & (size >= 2), centred * size / (size - 1).clamp(min=1), torch.zeros_like(rewards))


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
    token_losses, clipped = _clipped_losses(log_ratio, advantages[:, None], clip)
    if beta:
        to_reference = torch.where(completion_mask, reference_logprobs - token_logprobs, 0.0)
        token_losses = token_losses + beta * (to_reference.exp() - to_reference - 1)
    lengths = completion_mask.sum(dim=1).clamp(min=1) if max_completion_tokens is None else max_completion_tokens
    loss = (sum_completion_tokens(token_losses, completion_mask) / lengths).sum() / denominator
    return ObjectiveLoss(loss, (clipped & completion_mask).sum())


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
    losses, clipped = _clipped_losses(log_ratios, advantages, clip)
    return ObjectiveLoss(torch.where(kept, losses, 0.0).sum() / denominator, (clipped & kept).sum())


def _clipped_losses(log_ratios: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), and where the clipped one has been taken; any shape."""
    # with A >= 0 all that is above the bound is clipped or 0, but e^89 would be inf, and its gradient 0 * inf
    beyond = math.log1p(clip) + 1.0
    ratios = torch.where(advantages >= 0, log_ratios.clamp(max=beyond), log_ratios).exp()
    losses = -torch.min(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    clipped = ((ratios < 1 - clip) & (advantages < 0)) | ((ratios > 1 + clip) & (advantages > 0))
    return losses, clipped.detach()


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


def sft_loss(token_logprobs: Tensor, completion_mask: Tensor, rewards: Tensor, *, denominator: float) -> Tensor:
    """Negative log-likelihood weighted with the completions' rewards.

    Args:
        token_logprobs, completion_mask: (S, T); rewards: (S,) >= 0, anything for dropped completions.
        denominator: the update's tokens, each weighted with its completion's reward.
    """
    weights = torch.where(completion_mask.any(dim=1), rewards, 0.0)
    return -(weights * sum_completion_tokens(token_logprobs, completion_mask)).sum() / denominator
