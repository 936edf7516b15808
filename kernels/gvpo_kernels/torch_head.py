"""The `torch` implementation: chunks of tokens whose logits fit a byte budget, on any device.

Eager torch keeps several [N, V] tensors; here the largest temporaries are one chunk's logits (`CHUNK_BYTES`),
a float32 copy of a half-precision weight off CUDA, and the float32 sum of dWeight. All arithmetic is in
max(fp32, input dtype).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gvpo_kernels.head import (
    Gradients,
    GradientSums,
    HeadCall,
    Needs,
    TokenStatistics,
    capped,
    finish_statistics,
    fp16_gain,
    matmul,
    operand_dtype,
    slices,
)

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stash:
    """Kept from a forward pass: p_v times its cap's slope for every entry but the targets (which hold 0), (N, V)."""

    probabilities: Tensor


def forward(call: HeadCall, *, entropy: bool = False, factor: bool = False) -> tuple[TokenStatistics, Tensor | None]:
    """Statistics of every token; with `factor` also (N, H) d log p / d hidden, all that a frozen head needs."""
    call = _wide(call)
    hidden_factor = call.hidden.new_empty(call.hidden.shape, dtype=call.dtype) if factor else None
    statistics = []
    for rows in _chunks(call.num_tokens, call.vocab_size, call.dtype):
        part = call.rows(rows)
        stats, others, slope = _softmax(part, entropy, keep=factor)
        statistics.append(stats)
        if hidden_factor is not None:
            hidden_factor[rows] = _hidden_factor(part, stats, _probabilities(others, stats, slope))
        del others, slope  # before the next chunk is made
    return _concatenate(call, statistics, entropy), hidden_factor


def backward(call: HeadCall, statistics: TokenStatistics, coefficients: Tensor, needs: Needs) -> Gradients:
    """Gradients of sum(coefficients * token_logprobs), the logits computed anew."""
    sums, wide = GradientSums(call, needs), _wide(call)
    gain = fp16_gain(coefficients / call.temperature, operand_dtype(call))
    for rows in _chunks(call.num_tokens, call.vocab_size, call.dtype):
        part, stats = wide.rows(rows), statistics.rows(rows)
        logits, slope = _logits(part)
        logits.scatter_(-1, part.targets[:, None], -torch.inf)
        grad = _probabilities(logits, stats, None)
        # logits computed again may differ by a rounding, which a peaked softmax would pass on to p
        total = grad.sum(-1)
        grad.mul_(torch.where(total > 0, stats.one_minus_p / total, 1)[:, None])
        grad = grad if slope is None else grad.mul_(slope)
        sums.add(rows, part.hidden, _grad_logits(grad, part, stats, coefficients[rows] / gain), gain)
    return sums.result()


def forward_stash(call: HeadCall) -> tuple[TokenStatistics, Stash]:
    """Statistics, and the probabilities in the input dtype so that no logit is computed twice."""
    stash, wide = call.hidden.new_empty(call.num_tokens, call.vocab_size), _wide(call)
    statistics = []
    for rows in _chunks(call.num_tokens, call.vocab_size, call.dtype):
        stats, others, slope = _softmax(wide.rows(rows), False, keep=True)
        statistics.append(stats)
        stash[rows] = _probabilities(others, stats, slope)  # 0 at the targets, whose z is -inf
        del others, slope
    return _concatenate(call, statistics, False), Stash(stash)


def backward_stash(
    call: HeadCall, statistics: TokenStatistics, stash: Stash, coefficients: Tensor, sums: GradientSums, index: Tensor
) -> None:
    """Add the gradients of these tokens, which are rows `index` (n,) of the whole, to `sums`."""
    gain = fp16_gain(coefficients / call.temperature, operand_dtype(call))
    for rows in _chunks(call.num_tokens, call.vocab_size, call.dtype):
        part = call.rows(rows)
        grad = stash.probabilities[rows].to(call.dtype)
        grad = _grad_logits(grad, part, statistics.rows(rows), coefficients[rows] / gain)
        sums.add(index[rows], part.hidden.to(operand_dtype(call)), grad, gain)


def _wide(call: HeadCall) -> HeadCall:
    dtype = operand_dtype(call)
    bias = None if call.bias is None else call.bias.to(call.dtype)
    return replace(call, hidden=call.hidden.to(dtype), weight=call.weight.to(dtype), bias=bias)


def _logits(call: HeadCall) -> tuple[Tensor, Tensor | None]:
    """(n, V) scaled logits of one chunk and the cap's slopes (None without a soft cap)."""
    if call.hidden.dtype == call.dtype:
        raw = F.linear(call.hidden, call.weight, call.bias)
    else:
        raw = matmul(call.hidden, call.weight.T)
        raw = raw if call.bias is None else raw.add_(call.bias)
    if call.softcap is None:
        return raw.div_(call.temperature), None
    return capped(raw, call)


def _softmax(call: HeadCall, entropy: bool, keep: bool) -> tuple[TokenStatistics, Tensor, Tensor | None]:
    """Statistics of one chunk, its scaled logits with -inf at the targets (if they are to be kept), and the slopes."""
    logits, slope = _logits(call)
    column = call.targets[:, None]
    target = logits.gather(-1, column).squeeze(-1)
    target_slope = torch.ones_like(target) if slope is None else slope.gather(-1, column).squeeze(-1)
    logits.scatter_(-1, column, -torch.inf)
    maximum = logits.amax(-1)
    base = torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    shifted = logits - base if keep else logits.sub_(base)
    exponentials = torch.exp(shifted, out=None if entropy else shifted)
    weighted = (exponentials * shifted.nan_to_num_(neginf=0.0)).sum(-1) if entropy else None
    stats = finish_statistics(maximum, exponentials.sum(-1), target, target_slope, weighted)
    return stats, logits, slope


def _probabilities(logits: Tensor, stats: TokenStatistics, slope: Tensor | None) -> Tensor:
    """p times the cap's slope, in place of the (n, V) scaled logits."""
    probabilities = logits.sub_(stats.maximum[:, None]).sub_(stats.log_total[:, None]).exp_()
    return probabilities if slope is None else probabilities.mul_(slope)


def _grad_logits(probabilities: Tensor, call: HeadCall, stats: TokenStatistics, coefficients: Tensor) -> Tensor:
    """Gradients of the raw logits in place of the probabilities: c (onehot - p) slope / T."""
    scaled = coefficients.to(call.dtype) / call.temperature
    grad = probabilities.mul_(-scaled[:, None])
    return grad.scatter_(-1, call.targets[:, None], (scaled * stats.one_minus_p * stats.target_slope)[:, None])


def _hidden_factor(call: HeadCall, stats: TokenStatistics, probabilities: Tensor) -> Tensor:
    grad = _grad_logits(probabilities, call, stats, torch.ones_like(stats.maximum))
    return matmul(grad.to(call.weight.dtype), call.weight)


def _concatenate(call: HeadCall, parts: list[TokenStatistics], entropy: bool) -> TokenStatistics:
    if not parts:
        empty = torch.zeros(5, 0, dtype=call.dtype, device=call.hidden.device)
        return TokenStatistics(*(row.clone() for row in empty[: 5 if entropy else 4]))
    names = ("token_logprobs", "maximum", "log_total", "target_slope") + (("entropies",) if entropy else ())
    return TokenStatistics(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _chunks(num_tokens: int, vocab_size: int, dtype: torch.dtype) -> list[slice]:
    """Slices of tokens whose logits fit `CHUNK_BYTES`: a budget, not a share of the memory that happens to be free."""
    return list(slices(num_tokens, max(1, CHUNK_BYTES // (vocab_size * dtype.itemsize))))
