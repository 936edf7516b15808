"""GVPO: its loss, two other views of it, its ablations, and how a run trains with them.

`gvpo_loss` lives in `gvpo_kernels`; its two views are the same objective written as weighted likelihood
(`gvpo_nll_loss`) and as reinforcement learning (`gvpo_rl_loss`). In exact arithmetic all three have
the same gradient, which is what the views are for: to check it, and to read it.
"""

from torch import Tensor

from gvpo_kernels import GVPOLoss, gvpo_loss, gvpo_loss_of_log_ratios
from gvpo_kernels.reference import gvpo_metrics, prepare, rl_terms, sum_completion_tokens
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.objectives.base import GroupObjective, UpdateTerms

__all__ = ["GVPOLoss", "gvpo_loss", "gvpo_nll_loss", "gvpo_rl_loss", "length_scaled_gvpo_loss"]


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
    # what is scaled takes the log-ratios' place in the loss that GVPO has
    return gvpo_loss_of_log_ratios(scales * log_ratios, kept, rewards, group_ids, beta, num_groups=num_groups)


class GVPO(GroupObjective):
    """The whole loss."""

    is_fused = True

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Over the groups."""
        columns = (batch.kept, batch.rewards, batch.group_ids, self.beta)
        return gvpo_loss_of_log_ratios(log_ratios, *columns, num_groups=max(int(terms.denominator), 1)).loss


class AblatedGVPO(GroupObjective):
    """GVPO without one or both of its regularisers."""

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """The terms that are left."""
        reference = sum_completion_tokens(batch.reference_logprobs, batch.completion_mask).to(log_ratios.dtype)
        return gvpo_rl_loss(
            (log_ratios + reference)[:, None],
            reference[:, None],
            batch.kept[:, None],
            batch.rewards,
            batch.group_ids,
            self.beta,
            num_groups=max(int(terms.denominator), 1),
            variance_term=self.settings.variance_term is not False,
            covariance_term=self.settings.covariance_term is not False,
        ).loss


class LengthScaledGVPO(GroupObjective):
    """GVPO with log-ratios divided by a power of the completion's length."""

    def sequence_loss(self, log_ratios: Tensor, batch: CompletionBatch, terms: UpdateTerms) -> Tensor:
        """Lengths in tokens."""
        assert self.settings.length_exponent is not None
        scales = batch.lengths.clamp(min=1).to(log_ratios.dtype).pow(-self.settings.length_exponent)
        columns = (scales, batch.kept, batch.rewards, batch.group_ids, self.beta)
        return length_scaled_gvpo_loss(log_ratios, *columns, num_groups=max(int(terms.denominator), 1)).loss
