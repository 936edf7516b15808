"""Updates whose groups are cut over micro-batches: a pass without gradient first, then one with known coefficients.

A completion's gradient is beta d_i / (n (k - 1)) times that of its log-prob, and d_i holds the mean over its whole
group. Where a group's completions are in several micro-batches, all log-ratios are computed first, under the
weights that the update starts from; after that every completion can be trained on its own.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.objectives import gvpo_loss
from gvpo_lightning.policy import completion_logprobs


def sequence_coefficients(
    model: PreTrainedModel,
    parts: Sequence[CompletionBatch],
    beta: float,
    *,
    num_groups: int,
    temperature: float = 1.0,
    implementation: str = "auto",
    max_log_ratio: float = math.inf,
) -> tuple[list[Tensor], list[Tensor | None], Tensor]:
    """dL / d log pi(y_i|x) of every completion of an update, by micro-batch.

    Args:
        parts: the update's micro-batches; all completions of a group are in them.
        num_groups: the loss's denominator.
        max_log_ratio: finite log-ratios beyond it are as bad as others.

    Returns:
        for each micro-batch its (S,) coefficients and its (N,) entropies; and whether all log-ratios are sound,
        a bool scalar. If not, the coefficients are 0.
    """
    sums, entropies = [], []
    with torch.no_grad():
        for part in parts:
            logprobs, part_entropies = completion_logprobs(
                model, part, temperature=temperature, return_entropy=True, implementation=implementation
            )
            sums.append((logprobs - part.reference_logprobs.to(logprobs.dtype)).sum(dim=1))  # per token, then the sum
            entropies.append(None if part_entropies is None else part_entropies[part.completion_mask])
    kept, rewards, group_ids = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("kept", "rewards", "group_ids")
    )
    log_ratios = torch.cat(sums)
    finite = torch.isfinite(log_ratios).all() & (log_ratios.abs() <= max_log_ratio).all()
    # a completion as one token: the loss needs nothing else of it
    log_ratios = torch.where(finite, log_ratios, 0.0)[:, None].requires_grad_()
    zeros = torch.zeros_like(log_ratios)
    with torch.enable_grad():
        loss = gvpo_loss(log_ratios, zeros, kept[:, None], rewards, group_ids, beta, num_groups=num_groups).loss
    (coefficients,) = torch.autograd.grad(loss, log_ratios)
    coefficients = torch.where(finite, coefficients, zeros).squeeze(1)
    return list(coefficients.split([len(part) for part in parts])), entropies, finite
