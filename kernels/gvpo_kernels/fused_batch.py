"""The loss's side of `fused_gvpo_loss`: its arguments, their checks, and each token's coefficient dL / d log p."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels.group_loss import GroupLoss, check_groups, check_packing, count_groups, group_loss

MODES = ("auto", "recompute", "stash")


@dataclass(frozen=True)
class Outcome:
    """A loss, (S,) log-ratios and residuals, and (N,) coefficients dL / d token log-prob; all detached."""

    loss: Tensor
    log_ratios: Tensor
    residuals: Tensor
    coefficients: Tensor


@dataclass(frozen=True)
class LossBatch:
    """Packed completions with what the loss needs of them; arguments as in `fused_gvpo_loss`."""

    reference_logprobs: Tensor
    cu_seqlens: Tensor
    rewards: Tensor | None
    group_ids: Tensor | None
    beta: float
    num_groups: int | None = None
    sequence_coefficients: Tensor | None = None
    implementation: str = "auto"

    def outcome(self, token_logprobs: Tensor, *, gradient: bool) -> Outcome:
        """Loss and coefficients at (N,) detached log-probs; without `gradient` the coefficients are 0."""
        leaf = token_logprobs.detach()
        if not gradient:
            with torch.no_grad():
                result, coefficients = self._evaluate(leaf), torch.zeros_like(leaf)
        else:
            with torch.enable_grad():
                result = self._evaluate(leaf.requires_grad_())
            (coefficients,) = torch.autograd.grad(result.loss, leaf)
        return Outcome(result.loss.detach(), result.log_ratios, result.residuals, coefficients)

    def loss(self, token_logprobs: Tensor) -> Tensor:
        """The scalar loss, differentiable in the (N,) log-probs."""
        return self._evaluate(token_logprobs).loss

    def completions(self, index: Tensor) -> tuple["LossBatch", Tensor]:
        """The batch of completions `index` (in that order) and the rows of its tokens."""
        starts, lengths = self.cu_seqlens[index].long(), self.cu_seqlens.diff()[index].long()
        ends = lengths.cumsum(0)
        shifts = torch.repeat_interleave(starts - (ends - lengths), lengths)
        rows = torch.arange(len(shifts), device=starts.device) + shifts
        part = replace(
            self,
            reference_logprobs=self.reference_logprobs[rows],
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)),
            rewards=None if self.rewards is None else self.rewards[index],
            group_ids=None if self.group_ids is None else self.group_ids[index],
        )
        return part, rows

    def token_coefficients(self) -> Tensor:
        """(N,) the completions' known coefficients, one a token."""
        assert self.sequence_coefficients is not None
        return torch.repeat_interleave(self.sequence_coefficients.detach(), self.cu_seqlens.diff())

    def _evaluate(self, token_logprobs: Tensor) -> GroupLoss:
        if self.sequence_coefficients is not None:
            return self._known(token_logprobs)
        assert self.rewards is not None
        assert self.group_ids is not None
        return group_loss(
            token_logprobs,
            self.reference_logprobs,
            self.cu_seqlens,
            self.rewards,
            self.group_ids,
            self.beta,
            num_groups=self.num_groups,
            implementation=self.implementation,
        )

    def _known(self, token_logprobs: Tensor) -> GroupLoss:
        assert self.sequence_coefficients is not None
        dtype = torch.promote_types(token_logprobs.dtype, torch.float32)
        coefficients = self.sequence_coefficients.detach().to(dtype)
        ratios = token_logprobs.to(dtype) - self.reference_logprobs.detach().to(dtype)
        log_ratios = torch.segment_reduce(ratios, "sum", offsets=self.cu_seqlens.to(torch.int64), initial=0)
        return GroupLoss((coefficients * log_ratios).sum(), log_ratios.detach(), torch.zeros_like(log_ratios.detach()))


def count_batch_groups(batch: LossBatch, implementation: str) -> LossBatch:
    """The batch with its loss's implementation, and its denominator counted where none was given."""
    num_groups = batch.num_groups
    if batch.sequence_coefficients is None and num_groups is None:
        assert batch.group_ids is not None
        num_groups = max(count_groups(batch.cu_seqlens, batch.group_ids), 1)
    return replace(batch, num_groups=num_groups, implementation=implementation)


def check_fused(hidden: Tensor, batch: LossBatch, mode: str, drop_below: float) -> None:
    """Raise ValueError for arguments of `fused_gvpo_loss` that do not fit each other."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
    if not 0 <= drop_below < math.inf:
        raise ValueError(f"drop_below must be >= 0, got {drop_below}: it is a fraction of the largest coefficient.")
    stand_in = hidden.detach()[:, :1].sum(1)  # (N,) where log-probs will be
    coefficients = batch.sequence_coefficients
    if coefficients is None:
        if mode == "stash" and drop_below > 0:
            raise ValueError(
                f"drop_below must be 0 with mode='stash', got {drop_below}: a group is finished before the largest "
                "coefficient of all groups is known. Use mode='recompute'."
            )
        for name, value in (("rewards", batch.rewards), ("group_ids", batch.group_ids)):
            if value is None:
                raise ValueError(f"{name} must be a tensor, got None: only sequence_coefficients make it superfluous.")
        assert batch.rewards is not None
        assert batch.group_ids is not None
        columns = (batch.reference_logprobs, batch.cu_seqlens, batch.rewards, batch.group_ids)
        check_groups(stand_in, *columns, batch.beta, batch.num_groups)
        return
    check_packing(stand_in, batch.reference_logprobs, batch.cu_seqlens)
    num_sequences = len(batch.cu_seqlens) - 1
    if coefficients.shape != (num_sequences,) or not coefficients.is_floating_point():
        raise ValueError(
            f"sequence_coefficients must be floating ({num_sequences},), one a completion, got "
            f"{coefficients.dtype} {tuple(coefficients.shape)}."
        )
    if coefficients.device != hidden.device:
        raise ValueError(f"sequence_coefficients must be on {hidden.device}, got {coefficients.device}.")
    if not bool(torch.isfinite(coefficients[batch.cu_seqlens.diff() > 0]).all()):
        raise ValueError(
            "sequence_coefficients must be finite for every completion with tokens, got "
            f"{coefficients.tolist()[:8]}: skip the update instead."
        )
