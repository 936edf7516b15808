"""GVPO's loss from hidden states: the head's log-probs and the loss over groups in one autograd function.

Joining them buys what neither has alone: tokens whose gradient is zero or below a bound are left out of the
backward pass, one group's gradients can be kept instead of being computed twice, and coefficients that are
known beforehand let each token be finished where it is met. The loss itself is `group_loss`, nowhere else.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gvpo_kernels.fused_batch import LossBatch, check_fused, count_batch_groups
from gvpo_kernels.head import Gradients, GradientSums, HeadCall, Needs, slices
from gvpo_kernels.inputs import (
    autocast_inputs,
    check_head,
    choose_implementation,
    differentiable_once,
    load_implementation,
    no_autocast,
)
from gvpo_kernels.linear_logprob import backward_of_call, needs_of, save_call
from gvpo_kernels.reference import linear_logprob_reference


@dataclass(frozen=True)
class FusedLoss:
    """The loss of N tokens in S completions; everything but `loss` is detached.

    Attributes:
        loss: scalar, differentiable once in hidden, weight and bias.
        token_logprobs: (N,) in nats under the policy.
        log_ratios: (S,) log pi - log pi' in nats; 0 for dropped completions.
        residuals: (S,) centred implicit reward minus advantage; 0 where it does not count, and everywhere when
            `sequence_coefficients` stand in for them.
        dropped_mass: scalar in [0, 1], the share of sum 2 |c| (1 - p) / T that `drop_below` left out.
        entropies: (N,) in nats with `return_entropy`, else None.
    """

    loss: Tensor
    token_logprobs: Tensor
    log_ratios: Tensor
    residuals: Tensor
    dropped_mass: Tensor
    entropies: Tensor | None = None


@torch.compiler.disable  # which tokens count is known only at run time: a compiled caller runs this part eagerly
def fused_gvpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reference_logprobs: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    beta: float,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    implementation: str = "auto",
    mode: str = "auto",
    drop_below: float = 0.0,
    num_groups: int | None = None,
    sequence_coefficients: Tensor | None = None,
    return_entropy: bool = False,
) -> FusedLoss:
    """GVPO's loss and, on backward, dHidden, dWeight and dBias, without the (N, V) logits.

    Args:
        hidden, weight, targets, bias, temperature, softcap: the head, as in `linear_logprob`.
        reference_logprobs, cu_seqlens, rewards, group_ids, beta, num_groups: the loss, as in `group_loss`.
        implementation: `triton`, `torch`, `reference` or `auto`, as in `linear_logprob`.
        mode: `recompute` computes the logits again in the backward pass (8NHV, smallest memory); `stash` keeps
            one group's gradients of the logits, (tokens of the group, V) in the input dtype, and forms the
            gradients group by group in the forward pass (6NHV; can be differentiated once). `auto`: `recompute`,
            or with `sequence_coefficients` streaming over blocks of tokens (6NHV). A head without gradient
            always takes the 4NHV way: d log p / d hidden in the forward pass.
        drop_below: tokens whose bound 2 |c| (1 - p) / T on their logits' gradient (sum of absolute values) is
            below this fraction of the largest |c| get no gradient. 0 leaves out nothing but c = 0.
        sequence_coefficients: (S,) dL / d log pi(y_i|x) where it is already known (a group cut over
            micro-batches; a first update, where all log-ratios are 0). The loss is then sum c_i log_ratio_i, whose
            gradient this is; rewards and group_ids are not used and may be None.
        return_entropy: also return the tokens' entropies; not where gradients are formed in the forward pass
            (`stash`, streaming), which keeps too little for them.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_head(hidden, weight, targets, bias, temperature, softcap)
    batch = LossBatch(reference_logprobs, cu_seqlens, rewards, group_ids, beta, num_groups, sequence_coefficients)
    check_fused(hidden, batch, mode, drop_below)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    name = choose_implementation(implementation, hidden)
    call = HeadCall(hidden, weight, targets.to(torch.int64), bias, temperature, softcap)
    needs, batch = needs_of(call), count_batch_groups(batch, implementation)
    way = _resolve(mode, batch, needs)
    if return_entropy and way in ("stash", "stream"):
        raise ValueError(f"return_entropy must be False in the way '{way}': use mode='recompute'.")
    with no_autocast(hidden):
        if name == "reference":
            return _reference(call, batch, drop_below, return_entropy)
        options = Options(load_implementation(name), way, drop_below, return_entropy)
        record = FusedLoss(*_FusedLoss.apply(hidden, weight, bias, call, needs, batch, options))
        return record if return_entropy else replace(record, entropies=None)


@dataclass(frozen=True)
class Options:
    """How to run: the implementation's module, one of `recompute`, `factor`, `stash`, `stream`, and the bound."""

    implementation: ModuleType
    mode: str
    drop_below: float
    entropy: bool


def _resolve(mode: str, batch: LossBatch, needs: Needs) -> str:
    if not needs.any:
        return "recompute"
    if needs.frozen_head:
        return "factor"
    if batch.sequence_coefficients is not None and mode != "recompute":
        return "stream"
    return "stash" if mode == "stash" else "recompute"


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: HeadCall,
        needs: Needs,
        batch: LossBatch,
        options: Options,
    ) -> tuple[Tensor, ...]:
        call = HeadCall(hidden, weight, call.targets, bias, call.temperature, call.softcap)
        ctx.needs, ctx.options, ctx.gradients = needs, options, None
        entropies = None
        if options.mode in ("stash", "stream"):
            token_logprobs, dropped_mass, ctx.gradients = forward_gradients(
                call, needs, batch, options.implementation, options.mode, options.drop_below
            )
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
            outcome = batch.outcome(token_logprobs, gradient=False)
        else:
            factor = options.mode == "factor"
            statistics, hidden_factor = options.implementation.forward(call, entropy=options.entropy, factor=factor)
            token_logprobs, entropies = statistics.token_logprobs, statistics.entropies
            outcome = batch.outcome(token_logprobs, gradient=needs.any)
            coefficients, dropped_mass = drop_small(
                outcome.coefficients, statistics.one_minus_p, call.temperature, options.drop_below
            )
            ctx.mode_coefficients = coefficients
            save_call(ctx, call, statistics, hidden_factor)
        entropies = token_logprobs.new_empty(0) if entropies is None else entropies
        results = (outcome.loss, token_logprobs, outcome.log_ratios, outcome.residuals, dropped_mass, entropies)
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.options.mode in ("stash", "stream"):
            gradients = _finish(ctx, grad_loss)
        else:
            gradients = backward_of_call(ctx, ctx.mode_coefficients * grad_loss, ctx.options.implementation)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None


def _finish(ctx: Any, grad_loss: Tensor) -> Gradients:
    """Scale the gradients that the forward pass left by the upstream one, in place, and let go of them."""
    if ctx.gradients is None:
        raise RuntimeError(
            f"the gradients of fused_gvpo_loss in mode '{ctx.options.mode}' were formed in its forward pass and are "
            "used up by one backward pass: use mode='recompute' to keep the graph for a second one."
        )
    made, ctx.gradients = ctx.gradients, None
    pairs = zip((made.hidden, made.weight, made.bias), ctx.dtypes, strict=True)
    return Gradients(*(None if g is None else g.mul_(grad_loss.to(g.device)).to(dtype) for g, dtype in pairs))


def drop_small(
    coefficients: Tensor, one_minus_p: Tensor, temperature: float, drop_below: float
) -> tuple[Tensor, Tensor]:
    """(N,) coefficients with those below the bound set to 0, and the share of the bounds' sum that went with them."""
    zero = torch.zeros((), dtype=coefficients.dtype, device=coefficients.device)
    if drop_below == 0 or not len(coefficients):
        return coefficients, zero
    bound = 2 * coefficients.abs() * one_minus_p / temperature
    kept = ~(bound < drop_below * coefficients.abs().max())  # not-a-number stays, to be seen
    total = bound.sum()
    dropped = torch.where(kept, zero, bound).sum()
    return torch.where(kept, coefficients, zero), torch.where(total > 0, dropped / total, zero)


def _reference(call: HeadCall, batch: LossBatch, drop_below: float, entropy: bool) -> FusedLoss:
    """The same by plain autograd through stored logits."""
    token_logprobs, entropies = linear_logprob_reference(**vars(call), return_entropy=True)
    first = batch.outcome(token_logprobs, gradient=token_logprobs.requires_grad)
    coefficients, dropped_mass = drop_small(
        first.coefficients, -torch.expm1(token_logprobs.detach()), call.temperature, drop_below
    )
    # a token that is left out keeps its value and loses its gradient
    passing = torch.where((coefficients != 0) | (first.coefficients == 0), token_logprobs, token_logprobs.detach())
    loss = batch.loss(passing)
    return FusedLoss(
        loss, token_logprobs.detach(), first.log_ratios, first.residuals, dropped_mass, entropies if entropy else None
    )


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
        coefficients, piece_mass = coefficients_of(statistics.token_logprobs)
        mass += piece_mass
        if bool((coefficients != 0).any()):
            implementation.backward_stash(part, statistics, stash, coefficients, sums, rows)
        del stash, statistics
    dropped, total = mass
    return token_logprobs, torch.where(total > 0, dropped / total, mass.new_zeros(())), sums.result(keep_wide=True)


# from a piece's log-probs to its coefficients, and the bounds' sums over what is dropped and over all
_CoefficientsOf = Callable[[Tensor], tuple[Tensor, Tensor]]


def _group_coefficients(batch: LossBatch, token_logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """A whole group's coefficients follow from its own log-probs and the number of groups."""
    return batch.outcome(token_logprobs, gradient=True).coefficients, token_logprobs.new_zeros(2)


def _known_coefficients(
    coefficients: Tensor, threshold: Tensor, temperature: float, token_logprobs: Tensor
) -> tuple[Tensor, Tensor]:
    """Coefficients that were given; small ones are dropped once the probabilities are known."""
    bound = -2 * coefficients.abs() * torch.expm1(token_logprobs) / temperature
    small = bound < threshold
    mass = torch.stack([torch.where(small, bound, 0).sum(), bound.sum()])
    return torch.where(small, torch.zeros_like(bound), coefficients), mass


def _groups(batch: LossBatch) -> Iterator[tuple[Tensor, _CoefficientsOf]]:
    """The token rows of each group, and its coefficients."""
    assert batch.group_ids is not None
    for group in torch.unique(batch.group_ids).tolist():
        part, rows = batch.completions(torch.nonzero(batch.group_ids == group).squeeze(-1))
        if len(rows):
            yield rows, partial(_group_coefficients, part)


def _blocks(call: HeadCall, batch: LossBatch, drop_below: float) -> Iterator[tuple[Tensor, _CoefficientsOf]]:
    """Blocks of tokens whose stash fits `STREAM_BYTES`, and their coefficients."""
    coefficients = batch.token_coefficients().to(call.dtype)
    threshold = drop_below * (coefficients.abs().max() if len(coefficients) else coefficients.sum())
    every = torch.arange(call.num_tokens, device=call.hidden.device)
    size = max(1, STREAM_BYTES // (call.vocab_size * call.hidden.dtype.itemsize))
    for piece in slices(call.num_tokens, size):
        yield every[piece], partial(_known_coefficients, coefficients[piece], threshold, call.temperature)
