"""The `triton` implementation: cuBLAS matmuls on tiles of logits, Triton kernels for everything between them.

Logits exist one float32 tile at a time, small enough to stay in a GPU's L2 cache (`TILE_BYTES`). The backward
pass walks over slices of the vocabulary: the gradients of one slice's logits (`SLICE_BYTES`, input dtype) give
that slice of dWeight in one matmul over all tokens, rounded once, and their part of dHidden, summed in float32.
Both are byte budgets; how much memory happens to be free changes nothing.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels.head import (
    SLICE_BYTES,
    TILE_BYTES,
    Gradients,
    GradientSums,
    HeadCall,
    Needs,
    TokenStatistics,
    add_matmul_,
    capped,
    finish_statistics,
    fp16_gain,
    matmul,
    slices,
)
from gvpo_kernels.triton_logits import RunningStatistics, grad_logits, stash_gradients, tile_launch, update_statistics

TILE_ROWS = 2048
ALIGNMENT = 64


@dataclass(frozen=True)
class Stash:
    """Kept from a forward pass: per slice of the vocabulary exp(z - m) times the cap's slope, 0 at the targets.

    Attributes:
        exponentials: (n, V) in the input dtype.
        maxima: (V / slice_columns, n) the m of each token and slice.
        slice_columns: vocabulary entries a slice.
    """

    exponentials: Tensor
    maxima: Tensor
    slice_columns: int


def forward(call: HeadCall, *, entropy: bool = False, factor: bool = False) -> tuple[TokenStatistics, Tensor | None]:
    """Statistics of every token; with `factor` also (N, H) d log p / d hidden, all that a frozen head needs."""
    call = _contiguous(call)
    running = RunningStatistics.start(call)
    expected = torch.zeros_like(call.hidden, dtype=torch.float32) if factor else None
    for rows, columns in _tiles(call):
        logits = matmul(call.hidden[rows], call.weight[columns].T)
        if expected is None:
            update_statistics(call, running, logits, rows, columns.start, entropy=entropy)
            continue
        before = running.maximum[rows].clone()
        exponentials = _aligned(logits, call.hidden.dtype)
        update_statistics(call, running, logits, rows, columns.start, entropy=entropy, exponentials=exponentials)
        expected[rows].mul_(_ratio(before, running.maximum[rows])[:, None])
        add_matmul_(expected[rows], exponentials, call.weight[columns])
    statistics = _finish(call, running, entropy)
    if expected is not None:
        _finish_factor(call, statistics, running, expected)
    return statistics, expected


def backward(call: HeadCall, statistics: TokenStatistics, coefficients: Tensor, needs: Needs) -> Gradients:
    """Gradients of sum(coefficients * token_logprobs), the logits computed anew, one slice of V at a time."""
    call = _contiguous(call)
    scaled = coefficients.float() / call.temperature
    gain = fp16_gain(scaled, call.hidden.dtype)
    scaled = scaled / gain
    grad_hidden = torch.zeros_like(call.hidden, dtype=torch.float32) if needs.hidden else None
    grad_weight = torch.empty_like(call.weight) if needs.weight else None
    grad_bias = torch.empty_like(call.bias) if needs.bias and call.bias is not None else None
    for columns in slices(call.vocab_size, _slice_columns(call)):
        grad = _grad_slice(call, statistics, scaled, columns)
        if grad_weight is not None:
            _store_matmul(grad_weight[columns], grad.T, call.hidden, gain)
        if grad_bias is not None:
            grad_bias[columns] = grad.sum(0, dtype=torch.float32).mul_(gain).to(grad_bias.dtype)
        if grad_hidden is not None:
            add_matmul_(grad_hidden, grad, call.weight[columns], gain)
    return Gradients(None if grad_hidden is None else grad_hidden.to(call.hidden.dtype), grad_weight, grad_bias)


def forward_stash(call: HeadCall) -> tuple[TokenStatistics, Stash]:
    """Statistics, and exponentials in the input dtype so that no logit is computed twice."""
    call = _contiguous(call)
    running = RunningStatistics.start(call)
    columns_a_slice = _tile_shape(call)[1]
    exponentials = _aligned(call.hidden.new_empty(call.num_tokens, 0), call.hidden.dtype, call.vocab_size)
    maxima = running.maximum.new_empty(-(-call.vocab_size // columns_a_slice), call.num_tokens)
    for rows, columns in _tiles(call):
        logits = matmul(call.hidden[rows], call.weight[columns].T)
        update_statistics(call, running, logits, rows, columns.start, exponentials=exponentials[rows, columns])
        maxima[columns.start // columns_a_slice, rows] = running.maximum[rows]
    return _finish(call, running, False), Stash(exponentials, maxima, columns_a_slice)


def backward_stash(
    call: HeadCall, statistics: TokenStatistics, stash: Stash, coefficients: Tensor, sums: GradientSums, index: Tensor
) -> None:
    """Add the gradients of these tokens, which are rows `index` (n,) of the whole, to `sums`; uses the stash up."""
    call = _contiguous(call)
    scaled = coefficients.float() / call.temperature
    gain = fp16_gain(scaled, call.hidden.dtype)
    scaled = scaled / gain
    scales = -scaled * torch.exp((stash.maxima - statistics.maximum) - statistics.log_total)
    target_gradients = scaled * statistics.one_minus_p * statistics.target_slope
    stash_gradients(stash.exponentials, call.targets, scales, target_gradients, stash.slice_columns)
    sums.add(index, call.hidden.to(sums.operand.dtype), stash.exponentials, gain)


def _grad_slice(call: HeadCall, statistics: TokenStatistics, scaled: Tensor, columns: slice) -> Tensor:
    """(n, columns) gradients of the logits in the input dtype, made from float32 tiles of some rows each."""
    width = columns.stop - columns.start
    grad = _aligned(call.hidden, call.hidden.dtype, width)
    for rows in slices(call.num_tokens, max(1, TILE_BYTES // (4 * width))):
        logits = matmul(call.hidden[rows], call.weight[columns].T)
        grad_logits(call.rows(rows), statistics.rows(rows), scaled[rows], logits, columns.start, grad[rows])
    return grad


def _finish(call: HeadCall, running: RunningStatistics, entropy: bool) -> TokenStatistics:
    target, slope = capped(running.raw_target, call)
    return finish_statistics(running.maximum, running.total, target, slope, running.weighted if entropy else None)


def _finish_factor(call: HeadCall, statistics: TokenStatistics, running: RunningStatistics, expected: Tensor) -> None:
    """From sums of exp(z - m) slope w over the other entries to d log p / d hidden, in place."""
    share = torch.exp((running.maximum - statistics.maximum) - statistics.log_total) / call.temperature
    own = statistics.one_minus_p * statistics.target_slope / call.temperature
    for rows in slices(call.num_tokens, TILE_ROWS):
        target_rows = call.weight[call.targets[rows]].float()
        expected[rows].mul_(-share[rows, None]).add_(target_rows.mul_(own[rows, None]))


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """exp(before - after), 0 where nothing had been seen before."""
    return torch.where(before == -torch.inf, 0.0, torch.exp(before - after))


def _store_matmul(out: Tensor, left: Tensor, right: Tensor, gain: float) -> None:
    """out = gain * left @ right with float32 sums, rounded once."""
    if left.is_cuda and gain == 1.0:
        torch.mm(left, right, out=out)
    else:
        out.copy_(matmul(left, right).mul_(gain))


def _aligned(like: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """An uninitialised (rows, width) tensor whose rows start where matmuls are fast, whatever the width."""
    width = like.shape[1] if width is None else width
    padded = -(-width // ALIGNMENT) * ALIGNMENT
    return torch.empty(len(like), padded, dtype=dtype, device=like.device)[:, :width]


def _tile_shape(call: HeadCall) -> tuple[int, int]:
    """Rows and columns of a tile of float32 logits."""
    rows = max(1, min(call.num_tokens, TILE_ROWS))
    return rows, _whole_blocks(TILE_BYTES // (4 * rows))


def _slice_columns(call: HeadCall) -> int:
    """Vocabulary entries whose gradients, for all tokens, fit `SLICE_BYTES`."""
    return _whole_blocks(SLICE_BYTES // (call.hidden.dtype.itemsize * max(call.num_tokens, 1)))


def _whole_blocks(columns: int) -> int:
    block = tile_launch()["BLOCK_COLUMNS"]
    return max(1, columns // block) * block


def _tiles(call: HeadCall) -> list[tuple[slice, slice]]:
    height, width = _tile_shape(call)
    return [(r, c) for r in slices(call.num_tokens, height) for c in slices(call.vocab_size, width)]


def _contiguous(call: HeadCall) -> HeadCall:
    bias = None if call.bias is None else call.bias.contiguous()
    return replace(
        call,
        hidden=call.hidden.contiguous(),
        weight=call.weight.contiguous(),
        targets=call.targets.contiguous(),
        bias=bias,
    )
