"""Updates whose groups are cut over micro-batches or ranks: a pass without gradient, then one with known coefficients.

A completion's gradient in GVPO is beta d_i / (n (k - 1)) times that of its log-prob, and d_i holds the mean over its
whole group. Where a group's completions are in several micro-batches, all log-ratios are computed first, under the
weights that the update starts from, and exchanged; after that every completion can be trained on its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_kernels import gvpo_loss_of_log_ratios
from gvpo_lightning.data.batch import CompletionBatch
from gvpo_lightning.policy.head import Scoring, completion_logprobs


def first_pass(
    model: PreTrainedModel, parts: Sequence[CompletionBatch], scoring: Scoring
) -> tuple[list[Tensor], list[Tensor]]:
    """For each micro-batch its (S,) log-ratios and its (N,) entropies, without gradient."""
    log_ratios, entropies = [], []
    with torch.no_grad():
        for part in parts:
            logprobs, part_entropies = completion_logprobs(model, part, scoring, return_entropy=True)
            assert part_entropies is not None
            # per token, then the sum: two large sums subtracted would lose what the loss is made of
            log_ratios.append((logprobs - part.reference_logprobs.to(logprobs.dtype)).sum(dim=1))
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


def scatter(parts: Sequence[Tensor], positions: Sequence[Sequence[int]], length: int) -> Tensor:
    """(length,) values of an update's completions from those of this rank's micro-batches; 0 for all others.

    Args:
        parts: one tensor a micro-batch; of an empty one, which holds a dropped completion, nothing is taken.
        positions: where each of its completions stands.
    """
    own = torch.cat([part[: len(where)] for part, where in zip(parts, positions, strict=True)])
    index = torch.tensor([position for where in positions for position in where], dtype=torch.int64)
    return own.new_zeros(length).index_copy_(0, index.to(own.device), own)
