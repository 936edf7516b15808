"""Triton kernels of the loss over groups: one program a group forward, one program a piece of a completion backward.

Each sum over tokens or members belongs to one program and has a fixed order, so that runs agree bit by bit
(an atomic or `index_add` on a GPU would not).
"""

# mypy: allow-untyped-defs
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gvpo_kernels.triton_logits import on_device

MAX_GROUP_SIZE = 512  # 1,024 spills registers
TILE = 1024  # 2,048 spills registers for some sizes
BACKWARD_BLOCK = 1024


def forward_launch(group_size: int) -> dict[str, int]:
    """Block sizes for groups of up to `group_size` completions; members times tokens is one tile of registers."""
    members = max(2, triton.next_power_of_2(group_size))
    return {"BLOCK_MEMBERS": members, "BLOCK_TOKENS": max(2, TILE // members), "num_warps": 4 if members < 256 else 8}


@dataclass(frozen=True)
class GroupOutcome:
    """(G,) losses and, per completion, (S,) log-ratios, residuals and dL / d log-ratio."""

    losses: Tensor
    log_ratios: Tensor
    residuals: Tensor
    coefficients: Tensor


@triton.jit
def _forward_kernel(
    token_logprobs,
    reference_logprobs,
    cu_seqlens,
    members,  # (S,) completions sorted by group
    group_starts,  # (G + 1,) where each group starts in `members`
    rewards,
    settings,  # beta and 1 / num_groups, in the dtype of the sums (a scalar argument would be float32)
    losses,
    log_ratios,
    residuals,
    coefficients,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    group = tl.program_id(0)
    dtype = settings.dtype.element_ty
    beta, share = tl.load(settings), tl.load(settings + 1)
    first = tl.load(group_starts + group)
    lane = tl.arange(0, BLOCK_MEMBERS)
    member = lane < tl.load(group_starts + group + 1) - first
    completion = tl.load(members + first + lane, mask=member, other=0)
    start = tl.load(cu_seqlens + completion, mask=member, other=0).to(tl.int64)
    length = tl.load(cu_seqlens + completion + 1, mask=member, other=0).to(tl.int64) - start
    kept = length > 0

    log_ratio = tl.zeros([BLOCK_MEMBERS], dtype=dtype)
    for offset in range(0, tl.max(length, axis=0), BLOCK_TOKENS):
        column = offset + tl.arange(0, BLOCK_TOKENS)
        inside = column[None, :] < length[:, None]
        position = start[:, None] + column[None, :]
        policy = tl.load(token_logprobs + position, mask=inside, other=0).to(dtype)
        reference = tl.load(reference_logprobs + position, mask=inside, other=0).to(dtype)
        log_ratio += tl.sum(policy - reference, axis=1)

    size = tl.sum(kept.to(tl.int32), axis=0)
    divisor = tl.maximum(size, 1).to(dtype)
    reward = tl.load(rewards + completion, mask=kept, other=0).to(dtype)
    advantage = reward - tl.sum(reward, axis=0) / divisor
    residual = beta * (log_ratio - tl.sum(log_ratio, axis=0) / divisor) - advantage
    residual = tl.where(kept & (size >= 2), residual, 0.0)
    weight = share / tl.maximum(size - 1, 1).to(dtype)
    tl.store(losses + group, 0.5 * weight * tl.sum(residual * residual, axis=0))
    tl.store(log_ratios + completion, log_ratio, mask=member)
    tl.store(residuals + completion, residual, mask=member)
    tl.store(coefficients + completion, beta * weight * residual, mask=member)


@triton.jit
def _backward_kernel(coefficients, grad_loss, cu_seqlens, grad_token_logprobs, BLOCK_TOKENS: tl.constexpr):
    completion = tl.program_id(0)
    start = tl.load(cu_seqlens + completion).to(tl.int64)
    stop = tl.load(cu_seqlens + completion + 1).to(tl.int64)
    position = start + tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    value = tl.load(coefficients + completion) * tl.load(grad_loss).to(coefficients.dtype.element_ty)
    filled = tl.zeros([BLOCK_TOKENS], dtype=coefficients.dtype.element_ty) + value
    tl.store(grad_token_logprobs + position, filled, mask=position < stop)


def forward(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    group_index: Tensor,
    beta: float,
    num_groups: int,
) -> GroupOutcome:
    """Losses, log-ratios, residuals and coefficients; `group_index` (S,) counts groups from 0 without gaps."""
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    sizes = torch.bincount(group_index)
    largest = int(sizes.max()) if len(sizes) else 0
    if largest > MAX_GROUP_SIZE:
        raise ValueError(
            f"group_ids must put at most {MAX_GROUP_SIZE} completions in a group with implementation='triton', "
            f"got {largest}: use implementation='torch'."
        )
    group_starts = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    settings = torch.tensor([beta, 1.0 / num_groups], dtype=dtype, device=token_logprobs.device)
    losses = torch.empty(len(sizes), dtype=dtype, device=token_logprobs.device)
    per_completion = [torch.empty(len(rewards), dtype=dtype, device=token_logprobs.device) for _ in range(3)]
    if len(sizes):
        with on_device(token_logprobs):
            _forward_kernel[(len(sizes),)](
                token_logprobs.contiguous(),
                reference_logprobs.contiguous(),
                cu_seqlens.contiguous(),
                torch.argsort(group_index, stable=True),
                group_starts,
                rewards.contiguous(),
                settings,
                losses,
                *per_completion,
                **forward_launch(largest),
            )
    return GroupOutcome(losses, *per_completion)


def backward(coefficients: Tensor, grad_loss: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """(N,) gradients of the token log-probs, in the dtype of `like`."""
    grad = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if len(grad):
        longest = int(cu_seqlens.diff().max())
        grid = (len(coefficients), triton.cdiv(longest, BACKWARD_BLOCK))
        with on_device(grad):
            _backward_kernel[grid](
                coefficients, grad_loss.contiguous(), cu_seqlens.contiguous(), grad, BLOCK_TOKENS=BACKWARD_BLOCK
            )
    return grad
