"""Gradients formed in the forward pass: group by group (stash) or, with known coefficients, block by block (stream)."""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from gvpo_kernels.fused_batch import LossBatch
from gvpo_kernels.gradient_sums import GradientSums
from gvpo_kernels.head import Gradients, HeadCall, Needs, slices

STREAM_BYTES = 2**30


def forward_gradients(
    call: HeadCall, needs: Needs, batch: LossBatch, implementation: ModuleType, mode: str, drop_below: float
) -> tuple[Tensor, Tensor, Gradients]:
    """(N,) token log-probs, the dropped mass, and the gradients of the loss for an upstream gradient of 1.

    A piece's logits are computed once: its exponentials stay in a stash until its coefficients are known.
    """
    token_logprobs = torch.zeros(call.num_tokens, dtype=call.dtype, device=call.hidden.device)
    sums = GradientSums(call, needs)
    mass = torch.zeros(2, dtype=call.dtype, device=call.hidden.device)
    pieces = _groups(batch) if mode == "stash" else _blocks(call, batch, drop_below)
    for rows, coefficients_of in pieces:
        part = call.rows(rows)
        statistics, stash = implementation.forward_stash(part)
        token_logprobs[rows] = statistics.token_logprobs
        coefficients, piece_mass = coefficients_of(statistics.token_logprobs, call.temperature)
        mass += piece_mass
        if bool((coefficients != 0).any()):
            implementation.backward_stash(part, statistics, stash, coefficients, sums, rows)
        del stash, statistics
    dropped, total = mass
    return token_logprobs, torch.where(total > 0, dropped / total, mass.new_zeros(())), sums.result(keep_wide=True)


class _GroupCoefficients:
    """A whole group's coefficients follow from its own log-probs and the number of groups."""

    def __init__(self, batch: LossBatch) -> None:
        self.batch = batch

    def __call__(self, token_logprobs: Tensor, _temperature: float) -> tuple[Tensor, Tensor]:
        return self.batch.outcome(token_logprobs, gradient=True).coefficients, token_logprobs.new_zeros(2)


class _KnownCoefficients:
    """Coefficients that were given; small ones are dropped once the probabilities are known."""

    def __init__(self, coefficients: Tensor, threshold: Tensor) -> None:
        self.coefficients, self.threshold = coefficients, threshold

    def __call__(self, token_logprobs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        bound = -2 * self.coefficients.abs() * torch.expm1(token_logprobs) / temperature
        small = bound < self.threshold
        mass = torch.stack([torch.where(small, bound, 0).sum(), bound.sum()])
        return torch.where(small, torch.zeros_like(bound), self.coefficients), mass


def _groups(batch: LossBatch) -> Iterator[tuple[Tensor, _GroupCoefficients]]:
    """The token rows of each group, and its coefficients."""
    assert batch.group_ids is not None
    for group in torch.unique(batch.group_ids).tolist():
        part, rows = batch.completions(torch.nonzero(batch.group_ids == group).squeeze(-1))
        if len(rows):
            yield rows, _GroupCoefficients(part)


def _blocks(call: HeadCall, batch: LossBatch, drop_below: float) -> Iterator[tuple[Tensor, _KnownCoefficients]]:
    """Blocks of tokens whose stash fits `STREAM_BYTES`, and their coefficients."""
    coefficients = batch.token_coefficients().to(call.dtype)
    threshold = drop_below * (coefficients.abs().max() if len(coefficients) else coefficients.sum())
    every = torch.arange(call.num_tokens, device=call.hidden.device)
    size = max(1, STREAM_BYTES // (call.vocab_size * call.hidden.dtype.itemsize))
    for piece in slices(call.num_tokens, size):
        yield every[piece], _KnownCoefficients(coefficients[piece], threshold)
