"""The objective as pure functions of tensors: GVPO's loss, and its two other views.

`gvpo_loss` lives in `gvpo_kernels`; the views are the same objective written as weighted likelihood
(`gvpo_nll_loss`) and as reinforcement learning (`gvpo_rl_loss`). In exact arithmetic all three have
the same gradient, which is what the views are for: to check it, and to read it.
"""

from torch import Tensor

from gvpo_kernels.reference import GVPOLoss, gvpo_loss, gvpo_metrics, prepare, rl_terms

__all__ = ["GVPOLoss", "gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss"]


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
) -> GVPOLoss:
    """GVPO as reward maximisation with two regularisers; arguments, record and errors as in `gvpo_loss`.

    The sum of the three `objective/*` metrics: its value differs from `gvpo_loss`'s by a constant of the
    batch, Var(beta log pi' + R) / 2 averaged over the groups.
    """
    batch = prepare(token_logprobs, reference_logprobs, completion_mask, rewards, group_ids, beta)
    terms = rl_terms(batch)
    loss = sum(terms.values(), start=token_logprobs.new_zeros((), dtype=batch.log_ratios.dtype))
    return GVPOLoss(loss, batch.residuals.detach(), batch.log_ratios.detach(), gvpo_metrics(batch))
