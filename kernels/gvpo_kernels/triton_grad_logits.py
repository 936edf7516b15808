"""Triton kernels that turn logits, or stashed exponentials, into gradients of the logits."""

# mypy: allow-untyped-defs
import triton
import triton.language as tl
from torch import Tensor

from gvpo_kernels.head import HeadCall, TokenStatistics
from gvpo_kernels.triton_capped import capped
from gvpo_kernels.triton_launch import on_device, tile_launch


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
