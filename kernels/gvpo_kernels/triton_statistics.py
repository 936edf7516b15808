"""Triton kernel that folds one tile of logits into each token's running softmax statistics."""

# mypy: allow-untyped-defs
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gvpo_kernels.head import HeadCall
from gvpo_kernels.triton_capped import capped
from gvpo_kernels.triton_launch import on_device, tile_launch


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
