"""What every path of the fused loss works on: a language-model head applied to N tokens, and its matmuls.

Shapes: N tokens, H hidden features, V vocabulary entries. The scaled logits of a token are

    raw = hidden @ weight.T + bias,      z = cap(raw) / temperature,      cap(raw) = softcap * tanh(raw / softcap)

(the soft cap sits where models apply it: after the bias, before the temperature; without one cap(raw) = raw).
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# The Triton path's budgets; here, since memory is estimated from them where there is no Triton.
TILE_BYTES = 32 * 2**20
SLICE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class HeadCall:
    """One application of a head: hidden (N, H), weight (V, H), targets (N,), bias (V,) or None."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What log-probs are computed in: float32, or float64 for float64 inputs."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.hidden)

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    def rows(self, index: Tensor | slice) -> "HeadCall":
        """The same head on some of the tokens."""
        return replace(self, hidden=self.hidden[index], targets=self.targets[index])


@dataclass(frozen=True)
class TokenStatistics:
    """What the backward pass must know of each token's softmax; every tensor is (N,) in `HeadCall.dtype`.

    Attributes:
        token_logprobs: log p of the target, in nats; accurate relative to itself also where p -> 1.
        maximum, log_total: p_v = exp((z_v - maximum) - log_total). Two numbers rather than their sum, which
            would lose the small differences between large logits.
        target_slope: d cap / d raw at the target's logit (1 without a soft cap).
        entropies: in nats, or None where they were not asked for.
    """

    token_logprobs: Tensor
    maximum: Tensor
    log_total: Tensor
    target_slope: Tensor
    entropies: Tensor | None = None

    @property
    def one_minus_p(self) -> Tensor:
        """(N,) 1 - p of the targets without cancellation."""
        return -torch.expm1(self.token_logprobs)

    def rows(self, index: Tensor | slice) -> "TokenStatistics":
        """The statistics of some of the tokens."""
        fields = (self.token_logprobs, self.maximum, self.log_total, self.target_slope)
        return TokenStatistics(*(field[index] for field in fields))


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def frozen_head(self) -> bool:
        """Only the hidden states train."""
        return self.hidden and not self.weight and not self.bias

    @property
    def any(self) -> bool:
        """There is something to differentiate."""
        return self.hidden or self.weight or self.bias


@dataclass
class Gradients:
    """Gradients of a head's inputs, None where they were not asked for."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def finish_statistics(
    others_maximum: Tensor, others_total: Tensor, target: Tensor, slope: Tensor, others_weighted: Tensor | None
) -> TokenStatistics:
    """Statistics from sums over all entries but the target, which is what keeps log p exact where p -> 1.

    Args:
        others_maximum: (N,) m = max of z over the other entries (-inf for V = 1).
        others_total: (N,) sum of exp(z - m) over them.
        target, slope: (N,) the target's z and the slope of its cap.
        others_weighted: (N,) sum of exp(z - m) (z - m), needed for the entropy, or None.
    """
    log_others = torch.log(others_total)
    gap = (others_maximum - target) + log_others
    token_logprobs = -torch.logaddexp(torch.zeros_like(gap), gap)
    maximum = torch.maximum(others_maximum, target)
    log_total = torch.logaddexp((others_maximum - maximum) + log_others, target - maximum)
    entropies = None
    if others_weighted is not None:
        # sum of p (-log p): the target's own part, then e^(m - lse) [(lse - m) s - u] for the others
        rest = (maximum - others_maximum) + log_total
        scale = torch.exp(-rest)
        others = torch.where(scale > 0, scale * (rest * others_total - others_weighted), torch.zeros_like(scale))
        probability = torch.exp(token_logprobs)
        own = torch.where(probability > 0, probability * token_logprobs, torch.zeros_like(probability))
        entropies = others - own
    return TokenStatistics(token_logprobs, maximum, log_total, slope, entropies)


def capped(raw: Tensor, call: HeadCall) -> tuple[Tensor, Tensor]:
    """Scaled logits z of raw ones, and d cap / d raw; same shape as `raw`."""
    if call.softcap is None:
        return raw / call.temperature, torch.ones_like(raw)
    ratio = raw / call.softcap
    decay = torch.exp(-2 * ratio.abs())
    # sech^2; 1 - tanh^2 would cancel where the cap is reached
    slope = decay.mul(4).div_(decay.add_(1).square_())
    return ratio.tanh_().mul_(call.softcap / call.temperature), slope


def fp16_gain(coefficients: Tensor, dtype: torch.dtype) -> float:
    """A power of two to divide coefficients by, so that fp16 products neither vanish nor overflow; else 1.

    Gradients of a logit are as small as c p, and fp16 ends at 6e-8. bf16 and float32 have the range to do without.
    """
    if dtype != torch.float16 or not coefficients.numel():
        return 1.0
    largest = float(coefficients.abs().max())
    return 2.0 ** (math.frexp(largest)[1] - 8) if 0 < largest < math.inf else 1.0


def operand_dtype(call: HeadCall) -> torch.dtype:
    """What matmul operands are held in: the inputs' dtype where it has matmuls with float32 sums (CUDA)."""
    return call.hidden.dtype if call.hidden.is_cuda else call.dtype


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with float32 (float64) sums AND result, whatever the operands' dtype."""
    if left.dtype in (torch.float16, torch.bfloat16):
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left.float() @ right.float()
    return left @ right


def add_matmul_(total: Tensor, left: Tensor, right: Tensor, gain: float = 1.0) -> None:
    """total += gain * left @ right in `total`'s dtype (float32 or float64)."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=gain)
    elif left.is_cuda and _adds_wide(left.device, left.dtype):
        torch.addmm(total, left, right, alpha=gain, out_dtype=total.dtype, out=total)
    else:
        for rows in slices(len(left), 2048):
            total[rows].add_(matmul(left[rows], right), alpha=gain)


@functools.cache
def _adds_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a half-precision matmul to a float32 tensor in place; asked once, on 16 x 16."""
    total, operand = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, operand, operand, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def slices(length: int, size: int) -> Iterator[slice]:
    """[0, length) cut into pieces of `size`."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


class GradientSums:
    """dHidden row by row; dWeight (V, H) and dBias (V,) as wide sums, rounded once at the end."""

    def __init__(self, call: HeadCall, needs: Needs) -> None:
        self.call = call
        self.operand = call.weight.to(operand_dtype(call))
        make = call.hidden.new_zeros
        # fp16 waits for the upstream gradient before it is rounded: unscaled it would vanish
        self.wide = call.hidden.dtype == torch.float16
        hidden_dtype = call.dtype if self.wide else call.hidden.dtype
        self.hidden = make(call.hidden.shape, dtype=hidden_dtype) if needs.hidden else None
        self.weight = make(call.weight.shape, dtype=call.dtype) if needs.weight else None
        self.bias = make(call.vocab_size, dtype=call.dtype) if needs.bias else None

    def add(self, rows: Tensor | slice, hidden: Tensor, grad_logits: Tensor, gain: float = 1.0) -> None:
        """Add tokens `rows` with their (n, H) `hidden` and (n, V) gradients of raw logits, both times `gain`."""
        operand = grad_logits.to(self.operand.dtype)
        if self.hidden is not None:
            self.hidden[rows] = matmul(operand, self.operand).mul_(gain).to(self.hidden.dtype)
        if self.weight is not None:
            add_matmul_(self.weight, operand.T, hidden, gain)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype), alpha=gain)

    def result(self, *, keep_wide: bool = False) -> Gradients:
        """The gradients in their inputs' dtypes; with `keep_wide` fp16 ones stay float32 until they are scaled."""
        call, wide = self.call, keep_wide and self.wide

        def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            return total if total is None or like is None or wide else total.to(like.dtype)

        return Gradients(
            rounded(self.hidden, call.hidden), rounded(self.weight, call.weight), rounded(self.bias, call.bias)
        )
