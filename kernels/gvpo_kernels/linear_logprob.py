"""Token log-probs from hidden states without storing logits: chunks of tokens, recomputed in the backward pass.

For N tokens, H hidden features and a vocabulary of V the largest temporary is one chunk's logits
(`CHUNK_BYTES`), where eager torch keeps several [N, V] tensors. Works on any device; all arithmetic
is in max(fp32, input dtype).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 * 2**20


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` under softmax((hidden @ weight.T + bias) / temperature).

    Args:
        hidden: (N, H) floating.
        weight: (V, H) of the language-model head.
        targets: (N,) integer token ids in [0, V).
        bias: (V,) or None.
        temperature: > 0.
        return_entropy: also return the (N,) entropies in nats, which carry no gradient.

    Returns:
        (N,) log-probs in nats, float32 (float64 for float64 inputs), differentiable once in hidden, weight
        and bias with any upstream gradient; with `return_entropy` the pair (log-probs, entropies).

    Raises:
        ValueError: shapes that do not fit, targets outside the vocabulary, temperature <= 0.
    """
    _check(hidden, weight, targets, bias, temperature)
    token_logprobs, entropy = _LinearLogprob.apply(hidden, weight, targets.long(), bias, temperature, return_entropy)
    return (token_logprobs, entropy) if return_entropy else token_logprobs


def _without_autocast(function: Callable[..., Any]) -> Any:
    """Run in the dtypes that the code asks for, whatever the caller's autocast says; first tensor's device."""

    @functools.wraps(function)
    def wrapped(ctx: Any, tensor: Tensor, *args: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return function(ctx, tensor, *args)

    return wrapped


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        log_normalizer = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        token_logprobs = torch.empty_like(log_normalizer)
        entropies = torch.empty_like(log_normalizer) if entropy else log_normalizer.new_empty(0)
        for rows in _chunks(len(hidden), len(weight), dtype):
            logits = F.linear(hidden[rows].to(dtype), wide_weight, wide_bias).div_(temperature)
            log_normalizer[rows] = torch.logsumexp(logits, dim=-1)
            token_logprobs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_normalizer[rows]
            if entropy:
                probabilities = torch.exp(logits - log_normalizer[rows, None])
                # -inf logits have probability 0 and add nothing
                entropies[rows] = log_normalizer[rows] - (probabilities * logits.nan_to_num(neginf=0.0)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, bias, log_normalizer)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return token_logprobs, entropies

    @staticmethod
    @_without_autocast
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, bias, log_normalizer = ctx.saved_tensors
        dtype = log_normalizer.dtype
        wide_weight, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        need_hidden, need_weight, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(wide_weight) if need_weight else None
        grad_bias = log_normalizer.new_zeros(len(weight)) if need_bias else None
        for rows in _chunks(len(hidden), len(weight), dtype):
            wide_hidden = hidden[rows].to(dtype)
            logits = F.linear(wide_hidden, wide_weight, wide_bias).div_(ctx.temperature)
            coefficients = grad_logprobs[rows].to(dtype).div(ctx.temperature)
            grad_logits = logits.sub_(log_normalizer[rows, None]).exp_().mul_(-coefficients[:, None])
            grad_logits.scatter_add_(-1, targets[rows, None], coefficients[:, None])
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ wide_weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, wide_hidden)
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _chunks(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> list[slice]:
    """Slices of tokens whose logits fit `CHUNK_BYTES`."""
    size = max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must be (N, H) and weight (V, H) with one H, got {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if targets.shape != hidden.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be ({len(hidden)},) integers, got {targets.dtype} {tuple(targets.shape)}.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= len(weight)):
        raise ValueError(
            f"targets must be token ids in [0, {len(weight)}), got {int(targets.min())} … {int(targets.max())}."
        )
