"""Triton kernels on tiles of logits: running softmax statistics, gradients from logits or from stashed exponentials."""

# mypy: allow-untyped-defs
import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gvpo_kernels.head import HeadCall, TokenStatistics


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def interpreted() -> bool:
    """Kernels run as Python on the CPU (TRITON_INTERPRET=1); few large blocks are then fastest."""
    return bool(triton.knobs.runtime.interpret)


def tile_launch() -> dict[str, int]:
    """Block sizes of the kernels that walk over tiles of logits."""
    if interpreted():
        return {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 128}
    # the largest of those tried that spills no register in any variant of the kernels; 2 and 4 rows do
    return {"BLOCK_ROWS": 1, "BLOCK_COLUMNS": 1024, "num_warps": 4}


@triton.jit
def tanh(x):
    """Float32 tanh to 2 units in the last place, for which Triton has no built-in that its interpreter knows.

    Near 0, where 1 - 2 / (e^2x + 1) would cancel, an odd polynomial: fitted on [0, 0.625], relative error 4e-9.
    """
    square = x * x
    near = 0.13331448 + square * (-0.05374032 + square * (0.02064123 + square * -0.00570746))
    near = x + x * square * (-0.33333282 + square * near)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def capped(raw, temperature, softcap, SOFTCAP: tl.constexpr):
    """Scaled logits and the slope of the cap, as two float32 blocks."""
    if SOFTCAP:
        bent = raw / softcap
        decay = tl.exp(-2.0 * tl.abs(bent))
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        scaled = tanh(bent) * softcap / temperature
    else:
        slope = tl.full(raw.shape, 1.0, tl.float32)
        scaled = raw / temperature
    return scaled, slope


@dataclass
class RunningStatistics:
    """(N,) float32 each: over the vocabulary entries seen so far, the target's left out.

    Attributes:
        maximum: m = max z, -inf at first.
        total: sum of exp(z - m).
        weighted: sum of exp(z - m) (z - m); kept up to date only if the entropy is asked for.
        raw_target: the target's logit before soft cap and temperature.
    """

    maximum: Tensor
    total: Tensor
    weighted: Tensor
    raw_target: Tensor

    @classmethod
    def start(cls, call: HeadCall) -> "RunningStatistics":
        """Nothing seen yet."""
        zeros = torch.zeros(3, call.num_tokens, dtype=torch.float32, device=call.hidden.device)
        return cls(torch.full_like(zeros[0], -torch.inf), zeros[0], zeros[1], zeros[2])


@triton.jit
def _statistics_kernel(
    logits,
    logits_stride,
    bias,
    targets,
    maximum,
    total,
    weighted,
    raw_target,
    exponentials,
    exponentials_stride,
    num_rows,
    num_columns,
    first_column,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    in_rows = row < num_rows
    target = tl.load(targets + row, mask=in_rows, other=0) - first_column
    peak = tl.load(maximum + row, mask=in_rows, other=0.0)
    mass = tl.load(total + row, mask=in_rows, other=0.0)
    moment = tl.load(weighted + row, mask=in_rows, other=0.0)
    found = tl.load(raw_target + row, mask=in_rows, other=0.0)
    for offset in range(0, num_columns, BLOCK_COLUMNS):
        column = offset + tl.arange(0, BLOCK_COLUMNS)
        inside = in_rows[:, None] & (column < num_columns)[None, :]
        raw = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0.0)
        if HAS_BIAS:
            raw += tl.load(bias + first_column + column, mask=column < num_columns, other=0.0)[None, :].to(tl.float32)
        is_target = column[None, :] == target[:, None]
        found += tl.sum(tl.where(is_target & inside, raw, 0.0), axis=1)
        z, _ = capped(raw, temperature, softcap, SOFTCAP)
        z = tl.where(inside & (column[None, :] != target[:, None]), z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        drop = peak - base
        shrink = tl.exp(drop)
        e = tl.exp(z - base[:, None])
        if ENTROPY:
            # exp(-inf) (-inf) counts as 0
            moment = shrink * (moment + mass * tl.where(shrink > 0.0, drop, 0.0))
            moment += tl.sum(e * tl.where(e > 0.0, z - base[:, None], 0.0), axis=1)
        mass = mass * shrink + tl.sum(e, axis=1)
        peak = new_peak
    tl.store(maximum + row, peak, mask=in_rows)
    tl.store(total + row, mass, mask=in_rows)
    tl.store(weighted + row, moment, mask=in_rows)
    tl.store(raw_target + row, found, mask=in_rows)
    if STORE:
        base = tl.where(peak == float("-inf"), 0.0, peak)
        for offset in range(0, num_columns, BLOCK_COLUMNS):
            column = offset + tl.arange(0, BLOCK_COLUMNS)
            inside = in_rows[:, None] & (column < num_columns)[None, :]
            raw = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0.0)
            if HAS_BIAS:
                raw += tl.load(bias + first_column + column, mask=column < num_columns, other=0.0)[None, :].to(
                    tl.float32
                )
            z, slope = capped(raw, temperature, softcap, SOFTCAP)
            e = tl.where(column[None, :] == target[:, None], 0.0, tl.exp(z - base[:, None]) * slope)
            place = exponentials + row[:, None] * exponentials_stride + column[None, :]
            tl.store(place, e.to(exponentials.dtype.element_ty), mask=inside)


def update_statistics(
    call: HeadCall,
    running: RunningStatistics,
    logits: Tensor,
    rows: slice,
    first_column: int,
    *,
    entropy: bool = False,
    exponentials: Tensor | None = None,
) -> None:
    """Fold the raw float32 `logits` of `rows` and of the columns from `first_column` into `running`, in place.

    `exponentials`, if given, is filled with exp(z - maximum so far) times the cap's slope, 0 at the targets.
    """
    num_rows, num_columns = logits.shape
    launch = tile_launch()
    stored = logits if exponentials is None else exponentials
    with on_device(logits):
        _statistics_kernel[(triton.cdiv(num_rows, launch["BLOCK_ROWS"]),)](
            logits,
            logits.stride(0),
            logits if call.bias is None else call.bias,
            call.targets[rows],
            running.maximum[rows],
            running.total[rows],
            running.weighted[rows],
            running.raw_target[rows],
            stored,
            stored.stride(0),
            num_rows,
            num_columns,
            first_column,
            float(call.temperature),  # an int would become a constant and compile anew
            1.0 if call.softcap is None else float(call.softcap),
            HAS_BIAS=call.bias is not None,
            SOFTCAP=call.softcap is not None,
            ENTROPY=entropy,
            STORE=exponentials is not None,
            **launch,
        )


@triton.jit
def _grad_logits_kernel(
    logits,
    logits_stride,
    bias,
    targets,
    maximum,
    log_total,
    coefficients,
    target_gradients,
    grad,
    grad_stride,
    num_rows,
    num_columns,
    first_column,
    temperature,
    softcap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (column < num_columns)[None, :]
    target = tl.load(targets + row, mask=in_rows, other=0) - first_column
    peak = tl.load(maximum + row, mask=in_rows, other=0.0)
    normalizer = tl.load(log_total + row, mask=in_rows, other=0.0)
    coefficient = tl.load(coefficients + row, mask=in_rows, other=0.0)
    at_target = tl.load(target_gradients + row, mask=in_rows, other=0.0)
    raw = tl.load(logits + row[:, None] * logits_stride + column[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias + first_column + column, mask=column < num_columns, other=0.0)[None, :].to(tl.float32)
    z, slope = capped(raw, temperature, softcap, SOFTCAP)
    # the maximum goes first: it is as large as z, their difference is small and exact
    probability = tl.exp((z - peak[:, None]) - normalizer[:, None])
    value = tl.where(
        column[None, :] == target[:, None], at_target[:, None], -coefficient[:, None] * probability * slope
    )
    place = grad + row[:, None] * grad_stride + column[None, :]
    tl.store(place, value.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _stash_gradients_kernel(
    stash,
    stash_stride,
    targets,
    scales,
    scales_stride,
    target_gradients,
    num_rows,
    num_columns,
    slice_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1) * BLOCK_COLUMNS
    column = first + tl.arange(0, BLOCK_COLUMNS)
    in_rows = row < num_rows
    inside = in_rows[:, None] & (column < num_columns)[None, :]
    target = tl.load(targets + row, mask=in_rows, other=0)
    scale = tl.load(scales + (first // slice_columns).to(tl.int64) * scales_stride + row, mask=in_rows, other=0.0)
    at_target = tl.load(target_gradients + row, mask=in_rows, other=0.0)
    place = stash + row[:, None] * stash_stride + column[None, :]
    e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    value = tl.where(column[None, :] == target[:, None], at_target[:, None], e * scale[:, None])
    tl.store(place, value.to(stash.dtype.element_ty), mask=inside)


def grad_logits(
    call: HeadCall, statistics: TokenStatistics, coefficients: Tensor, logits: Tensor, first_column: int, grad: Tensor
) -> None:
    """Fill `grad` with c (onehot - p) slope / T for raw float32 `logits` (n, columns from `first_column`).

    Every token of `call` is a row; `coefficients` (n,) hold c / T.
    """
    launch = tile_launch()
    num_rows, num_columns = logits.shape
    grid = (triton.cdiv(num_rows, launch["BLOCK_ROWS"]), triton.cdiv(num_columns, launch["BLOCK_COLUMNS"]))
    with on_device(logits):
        _grad_logits_kernel[grid](
            logits,
            logits.stride(0),
            logits if call.bias is None else call.bias,
            call.targets,
            statistics.maximum,
            statistics.log_total,
            coefficients,
            coefficients * statistics.one_minus_p * statistics.target_slope,
            grad,
            grad.stride(0),
            num_rows,
            num_columns,
            first_column,
            float(call.temperature),  # an int would become a constant and compile anew
            1.0 if call.softcap is None else float(call.softcap),
            HAS_BIAS=call.bias is not None,
            SOFTCAP=call.softcap is not None,
            **launch,
        )


def stash_gradients(
    stash: Tensor, targets: Tensor, scales: Tensor, target_gradients: Tensor, slice_columns: int
) -> None:
    """Turn exponentials (n, V) into gradients in place: times `scales` (V / slice_columns, n), but at the targets."""
    launch = tile_launch()
    num_rows, num_columns = stash.shape
    assert slice_columns % launch["BLOCK_COLUMNS"] == 0, "a block must not straddle two slices"
    grid = (triton.cdiv(num_rows, launch["BLOCK_ROWS"]), triton.cdiv(num_columns, launch["BLOCK_COLUMNS"]))
    with on_device(stash):
        _stash_gradients_kernel[grid](
            stash,
            stash.stride(0),
            targets,
            scales,
            scales.stride(0),
            target_gradients,
            num_rows,
            num_columns,
            slice_columns,
            **launch,
        )
