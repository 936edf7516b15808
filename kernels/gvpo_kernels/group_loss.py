"""The loss over groups from packed token log-probs: completions one after another, delimited by `cu_seqlens`.

The mathematics is `reference.gvpo_loss`: the `torch` implementation pads and calls it, the `triton` one
computes the same sums in one kernel each way.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvpo_kernels.inputs import choose_implementation, differentiable_once, is_integer
from gvpo_kernels.reference import gvpo_loss


@dataclass(frozen=True)
class GroupLoss:
    """The loss of S completions.

    Attributes:
        loss: scalar, differentiable in the token log-probs.
        log_ratios: (S,) log pi - log pi' in nats, detached; 0 for dropped completions.
        residuals: (S,) centred implicit reward minus advantage, detached; 0 where it does not count.
    """

    loss: Tensor
    log_ratios: Tensor
    residuals: Tensor


@torch.compiler.disable  # reads lengths on the host
def group_loss(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    *,
    num_groups: int | None = None,
    implementation: str = "auto",
) -> GroupLoss:
    """GVPO's loss: the mean over groups with k >= 2 kept completions of sum residual^2 / (2 (k - 1)).

    Args:
        token_logprobs: (N,) in nats under the policy, completions one after another.
        reference_logprobs: (N,) under the reference; no gradient.
        cu_seqlens: (S + 1,) int32 or int64, completion i is tokens [cu_seqlens[i], cu_seqlens[i + 1]). An
            empty one is a dropped completion: it leaves its group and its reward is ignored (it may be NaN).
        rewards: (S,) finite for every kept completion.
        group_ids: (S,) integers in any order; completions of one prompt share an id.
        beta: strength of the implicit reward, > 0.
        num_groups: denominator of the mean; default: these groups with k >= 2.
        implementation: `triton` (CUDA; groups of up to 512), `torch`, `reference` or `auto`.

    Sums are in max(float32, input dtype) and differences are taken per token, before them. A batch in which
    nothing counts has a loss of 0 that is still connected to the graph.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_groups(token_logprobs, reference_logprobs, cu_seqlens, rewards, group_ids, beta, num_groups)
    reference_logprobs, rewards = reference_logprobs.detach(), rewards.detach()
    name = choose_implementation(implementation, token_logprobs.float())
    if name == "triton" and (implementation == "triton" or _fits_kernel(group_ids)):
        columns = (token_logprobs, reference_logprobs, cu_seqlens, rewards, group_ids, beta, num_groups)
        return GroupLoss(*_TritonGroupLoss.apply(*columns))
    dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
    policy, mask = _padded(token_logprobs.to(dtype), cu_seqlens)
    reference, _ = _padded(reference_logprobs.to(dtype), cu_seqlens)
    outcome = gvpo_loss(policy, reference, mask, rewards, group_ids, beta, num_groups=num_groups)
    return GroupLoss(outcome.loss, outcome.log_ratios, outcome.residuals)


class _TritonGroupLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token_logprobs: Tensor,
        reference_logprobs: Tensor,
        cu_seqlens: Tensor,
        rewards: Tensor,
        group_ids: Tensor,
        beta: float,
        num_groups: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from gvpo_kernels import triton_group_loss

        group_index = torch.unique(group_ids, return_inverse=True)[1]
        if num_groups is None:
            num_groups = count_groups(cu_seqlens, group_index)
        outcome = triton_group_loss.forward(
            token_logprobs, reference_logprobs, cu_seqlens, rewards, group_index, beta, max(num_groups, 1)
        )
        ctx.save_for_backward(outcome.coefficients, cu_seqlens, token_logprobs)
        ctx.mark_non_differentiable(outcome.log_ratios, outcome.residuals)
        return outcome.losses.sum(), outcome.log_ratios, outcome.residuals

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        from gvpo_kernels import triton_group_loss

        coefficients, cu_seqlens, token_logprobs = ctx.saved_tensors
        return triton_group_loss.backward(coefficients, grad_loss, cu_seqlens, token_logprobs), *(6 * [None])


def _fits_kernel(group_ids: Tensor) -> bool:
    """What decides for `auto`; a larger group with `triton` named is an error."""
    from gvpo_kernels.triton_group_loss import MAX_GROUP_SIZE

    sizes = torch.unique(group_ids, return_counts=True)[1]
    return not len(sizes) or int(sizes.max()) <= MAX_GROUP_SIZE


def count_groups(cu_seqlens: Tensor, group_ids: Tensor) -> int:
    """Groups with two or more kept completions."""
    _, sizes = torch.unique(group_ids[cu_seqlens.diff() > 0], return_counts=True)
    return int((sizes >= 2).sum())


def _padded(values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) packed values -> (S, T) with 0 beyond each completion, and the mask that says where."""
    lengths = cu_seqlens.diff()
    columns = torch.arange(int(lengths.max()) if len(lengths) else 0, device=values.device)
    mask = columns < lengths[:, None]
    positions = (cu_seqlens[:-1, None] + columns).clamp(max=max(len(values) - 1, 0))
    return torch.where(mask, values[positions], torch.zeros_like(values[:1]).sum()), mask


def check_groups(
    token_logprobs: Tensor,
    reference_logprobs: Tensor,
    cu_seqlens: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    beta: float,
    num_groups: int | None,
) -> None:
    """Raise ValueError for arguments of the loss over groups that do not fit each other."""
    check_packing(token_logprobs, reference_logprobs, cu_seqlens)
    num_sequences = len(cu_seqlens) - 1
    for name, tensor in (("rewards", rewards), ("group_ids", group_ids)):
        if tensor.shape != (num_sequences,):
            raise ValueError(
                f"{name} must have one entry a completion, shape ({num_sequences},), got {tuple(tensor.shape)}."
            )
        if tensor.device != token_logprobs.device:
            raise ValueError(f"{name} must be on {token_logprobs.device} like the log-probs, got {tensor.device}.")
    if not is_integer(group_ids):
        raise ValueError(f"group_ids must be integers, got {group_ids.dtype}: completions of one prompt share an id.")
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}: it scales log-ratios to rewards.")
    if num_groups is not None and num_groups < 1:
        raise ValueError(f"num_groups must be >= 1, got {num_groups}: leave it out to count this batch's groups.")
    bad = (cu_seqlens.diff() > 0) & ~torch.isfinite(rewards)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"rewards must be finite for every kept completion, got {float(rewards[row])} for completion {row}: "
            "drop it by giving it no tokens."
        )


def check_packing(token_values: Tensor, reference_logprobs: Tensor, cu_seqlens: Tensor) -> None:
    """Raise ValueError unless the log-probs are (N,) floating and cu_seqlens covers them."""
    num_tokens = len(token_values) if token_values.dim() else 0
    for name, tensor in (("token_logprobs", token_values), ("reference_logprobs", reference_logprobs)):
        if tensor.shape != (num_tokens,) or not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating ({num_tokens},), got {tensor.dtype} {tuple(tensor.shape)}.")
        if tensor.device != token_values.device:
            raise ValueError(f"{name} must be on {token_values.device} like the log-probs, got {tensor.device}.")
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (S + 1,) int32 or int64, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device != token_values.device:
        raise ValueError(f"cu_seqlens must be on {token_values.device} like the log-probs, got {cu_seqlens.device}.")
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, got {cu_seqlens.tolist()[:8]} … "
            f"{int(cu_seqlens[-1])}."
        )
