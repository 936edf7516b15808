"""Token log-probs from hidden states without storing logits; differentiable by recomputing them.

`linear_logprob` checks its inputs, chooses an implementation and runs one autograd function around it. The
implementations (`torch_head`, `triton_head`) share one interface: `forward`, `backward`, and a stashing pair.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gvpo_kernels.head import Gradients, HeadCall, Needs, TokenStatistics
from gvpo_kernels.inputs import (
    autocast_inputs,
    check_head,
    choose_implementation,
    differentiable_once,
    load_implementation,
    no_autocast,
)
from gvpo_kernels.reference import linear_logprob_reference


@torch.compiler.disable  # a data-dependent number of chunks: a compiled caller runs this part eagerly
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` under softmax(cap(hidden @ weight.T + bias) / temperature).

    Args:
        hidden: (N, H) floating.
        weight: (V, H) of the language-model head, in hidden's dtype (under autocast a mixture is cast to its dtype).
        targets: (N,) integer token ids in [0, V).
        bias: (V,) or None.
        temperature: > 0.
        softcap: cap(x) = softcap * tanh(x / softcap), applied before the temperature; None for none.
        return_entropy: also return the (N,) entropies in nats, which carry no gradient.
        implementation: `triton` (CUDA, not float64), `torch` (chunks of tokens, any device and dtype), `reference`
            (all logits stored) or `auto`: `triton` where it can run, else `torch`. What is named is what runs.

    Returns:
        (N,) log-probs in nats, float32 (float64 for float64 inputs), differentiable once in hidden, weight
        and bias with any upstream gradient; with `return_entropy` the pair (log-probs, entropies).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, targets outside the vocabulary, temperature or
            softcap <= 0, an implementation that cannot run here.
    """
    check_head(hidden, weight, targets, bias, temperature, softcap)
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    name = choose_implementation(implementation, hidden)
    call = HeadCall(hidden, weight, targets.to(torch.int64), bias, temperature, softcap)
    with no_autocast(hidden):
        if name == "reference":
            return linear_logprob_reference(**vars(call), return_entropy=return_entropy)
        token_logprobs, entropies = _LinearLogprob.apply(
            hidden, weight, bias, call, needs_of(call), return_entropy, load_implementation(name)
        )
    return (token_logprobs, entropies) if return_entropy else token_logprobs


def needs_of(call: HeadCall) -> Needs:
    """The gradients that autograd will ask for."""
    enabled = torch.is_grad_enabled()
    return Needs(*(enabled and t is not None and t.requires_grad for t in (call.hidden, call.weight, call.bias)))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        call: HeadCall,
        needs: Needs,
        entropy: bool,
        implementation: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        call = HeadCall(hidden, weight, call.targets, bias, call.temperature, call.softcap)
        statistics, factor = implementation.forward(call, entropy=entropy, factor=needs.frozen_head)
        save_call(ctx, call, statistics, factor)
        ctx.needs, ctx.implementation = needs, implementation
        entropies = statistics.token_logprobs.new_empty(0) if statistics.entropies is None else statistics.entropies
        ctx.mark_non_differentiable(entropies)
        return statistics.token_logprobs, entropies

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropies: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward_of_call(ctx, grad_logprobs, ctx.implementation)
        return gradients.hidden, gradients.weight, gradients.bias, None, None, None, None


def save_call(ctx: Any, call: HeadCall, statistics: TokenStatistics, factor: Tensor | None) -> None:
    """Keep for the backward pass; a frozen head's `factor` stands in for everything that it was made from."""
    ctx.temperature, ctx.softcap = call.temperature, call.softcap
    fields = (statistics.token_logprobs, statistics.maximum, statistics.log_total, statistics.target_slope)
    ctx.save_for_backward(call.hidden, call.weight, call.targets, call.bias, *fields, factor)


def backward_of_call(ctx: Any, coefficients: Tensor, implementation: ModuleType) -> Gradients:
    """Gradients of sum(coefficients * token_logprobs) from what `save_call` kept.

    Tokens whose coefficient is exactly 0, and so their gradients, are left out. The test is c = 0, not p = 1: p rounds
    to 1 where 1 - p is small but not zero.
    """
    hidden, weight, targets, bias, *fields, factor = ctx.saved_tensors
    call, statistics = HeadCall(hidden, weight, targets, bias, ctx.temperature, ctx.softcap), TokenStatistics(*fields)
    with no_autocast(hidden):  # the caller's autocast may still be on
        if factor is not None:
            return Gradients(hidden=(factor * coefficients[:, None]).to(hidden.dtype))
        kept = torch.nonzero(coefficients).squeeze(-1)
        if len(kept) == call.num_tokens:
            return implementation.backward(call, statistics, coefficients, ctx.needs)
        gradients = implementation.backward(call.rows(kept), statistics.rows(kept), coefficients[kept], ctx.needs)
        if gradients.hidden is not None:
            gradients.hidden = torch.zeros_like(hidden).index_copy_(0, kept, gradients.hidden)
        return gradients
