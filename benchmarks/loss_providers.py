"""What `benchmarks.loss` times: our paths, eager torch, and other libraries' losses.

A provider turns a problem into a scalar loss (or, forward only, into log-probs), and names the plain function
whose values and gradients it must have. Other libraries' log-probs are followed by GVPO's loss; those that offer
only a finished loss, which cannot couple the completions of a group, are held to that loss. Libraries are imported
where they run: one that is missing, or that needs another device, shows as such.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_problem import DROP_BELOW, Problem
from gvpo_kernels import fused_gvpo_loss, group_loss, linear_logprob

TRL_VOCABULARY_CHUNK = 32_768  # what its trainers pass


def eager_logprobs(problem: Problem) -> Tensor:
    """All logits stored in the input dtype, their log-softmax in float32 (float64)."""
    logits = problem.hidden @ problem.weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide), dim=-1).gather(-1, problem.targets[:, None]).squeeze(-1)


def gvpo(logprobs: Tensor, problem: Problem) -> Tensor:
    """GVPO's loss of (N,) log-probs from elsewhere."""
    return group_loss(logprobs, *problem.batch, implementation="torch").loss


def eager_loss(problem: Problem) -> Tensor:
    """GVPO's loss of `eager_logprobs`."""
    return gvpo(eager_logprobs(problem), problem)


def cross_entropy(problem: Problem) -> Tensor:
    """The mean over tokens, as libraries for supervised training compute it."""
    return -eager_logprobs(problem).mean()


def policy_gradient(problem: Problem) -> Tensor:
    """GRPO's loss at the policy that sampled, with the rewards as advantages."""
    logprobs = eager_logprobs(problem)
    advantages = torch.repeat_interleave(problem.rewards, problem.cu_seqlens.diff())
    return -(advantages * torch.exp(logprobs - logprobs.detach())).mean()


@dataclass(frozen=True)
class Provider:
    """One row of the table; `heavy` ones store all logits and run last.

    `allowed` is the error that a provider's own approximation adds to its budget.
    """

    name: str
    implementation: str
    mode: str
    run: Callable[[Problem], Tensor]
    truth: Callable[[Problem], Tensor] = eager_loss
    backward: bool = True
    frozen_head: bool = False
    heavy: bool = False
    allowed: float = 0.0


def ours(implementation: str) -> list[Provider]:
    """Our function in every mode."""

    def loss(problem: Problem, **options: Any) -> Tensor:
        columns = (problem.hidden, problem.weight, problem.targets, *problem.batch)
        return fused_gvpo_loss(*columns, implementation=implementation, **options).loss

    def stream(problem: Problem) -> Tensor:
        zeros = torch.zeros_like(problem.reference_logprobs)  # log-ratios, summed with either sign, would cancel
        columns = (problem.hidden, problem.weight, problem.targets, zeros, *problem.batch[1:])
        known = problem.rewards / len(problem.targets)
        return fused_gvpo_loss(*columns, implementation=implementation, sequence_coefficients=known).loss

    def logprobs(problem: Problem) -> Tensor:
        result = linear_logprob(problem.hidden, problem.weight, problem.targets, implementation=implementation)
        assert isinstance(result, Tensor)
        return result

    def row(mode: str, run: Callable[[Problem], Tensor], **more: Any) -> Provider:
        return Provider("ours", implementation, mode, run, **more)

    return [
        row("recompute", lambda p: loss(p, mode="recompute")),
        row("stash", lambda p: loss(p, mode="stash")),
        row("stream", stream, truth=known_coefficients),
        row("compaction", lambda p: loss(p, drop_below=DROP_BELOW), allowed=DROP_BELOW),
        row("frozen head", loss, frozen_head=True),
        row("forward only", logprobs, truth=eager_logprobs, backward=False),
    ]


def known_coefficients(problem: Problem) -> Tensor:
    """What streaming computes: the sum of each completion's coefficient times its log-prob."""
    coefficients = torch.repeat_interleave(problem.rewards, problem.cu_seqlens.diff()) / len(problem.targets)
    return (coefficients * eager_logprobs(problem)).sum()


def eager() -> list[Provider]:
    """Plain torch, as it is and compiled."""
    function = torch.compile(eager_logprobs, dynamic=False)
    return [
        Provider("eager", "torch", "forward only", eager_logprobs, truth=eager_logprobs, backward=False, heavy=True),
        Provider("eager", "torch", "frozen head", eager_loss, frozen_head=True, heavy=True),
        Provider("eager", "torch", "all logits", eager_loss, heavy=True),
        Provider("eager", "torch.compile", "all logits", lambda p: gvpo(function(p), p), heavy=True),
    ]


def other_libraries() -> list[Provider]:
    """Losses of torch, TRL, Liger, cut-cross-entropy and QuACK."""
    return [
        Provider("TRL", "chunked log-prob", "GVPO", trl_chunked),
        Provider("Liger", "scaled cross-entropy", "GVPO", liger_scaled),
        Provider("Liger", "fused GRPO", "policy gradient", liger_grpo, truth=policy_gradient),
        Provider("Liger", "fused cross-entropy", "mean cross-entropy", liger_cross_entropy, truth=cross_entropy),
        Provider("cut-cross-entropy", "filtered", "GVPO", lambda p: cut_cross_entropy(p, filter_eps="high")),
        Provider("cut-cross-entropy", "unfiltered", "GVPO", lambda p: cut_cross_entropy(p, filter_eps=None)),
        Provider("QuACK", "chunked", "mean cross-entropy", quack, truth=cross_entropy),
        Provider("F.linear_cross_entropy", "options", "mean cross-entropy", torch_chunked, truth=cross_entropy),
    ]


def trl_chunked(problem: Problem) -> Tensor:
    """TRL's log-probs in tiles, recomputed in the backward pass."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    head = (problem.hidden, problem.weight, None, problem.targets, 1.0, TRL_VOCABULARY_CHUNK)
    return gvpo(ChunkedLogProbFunction.apply(*head, None, 1.0, ())[0], problem)


def liger_scaled(problem: Problem) -> Tensor:
    """Liger's per-token cross-entropy: its Hopper kernel there, else chunks of 512 tokens."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    losses = LigerFusedLinearScaledCrossEntropyFunction.apply(problem.hidden, problem.weight, problem.targets)
    return gvpo(-losses, problem)


def liger_grpo(problem: Problem) -> Tensor:
    """Liger's GRPO loss, one completion at a time."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (len(problem.rewards), -1)
    targets = problem.targets.view(shape)
    hidden = problem.hidden.view(*targets.shape, problem.hidden.shape[-1])
    function = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, compiled=hidden.is_cuda)
    return function(hidden, problem.weight, targets, torch.ones_like(targets), problem.rewards)[0]


def liger_cross_entropy(problem: Problem) -> Tensor:
    """Liger's FLCE: gradients in the forward pass."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(problem.weight, problem.hidden, problem.targets)


def cut_cross_entropy(problem: Problem, filter_eps: str | None) -> Tensor:
    """Apple's per-token cross-entropy; "high" is its default and leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    columns = (problem.hidden, problem.weight, problem.targets)
    return gvpo(-linear_cross_entropy(*columns, reduction="none", filter_eps=filter_eps), problem)


def quack(problem: Problem) -> Tensor:
    """QuACK's chunked linear cross-entropy (Hopper and later): gradients in the forward pass."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(problem.hidden, problem.weight, problem.targets, reduction="mean")


def torch_chunked(problem: Problem) -> Tensor:
    """torch's own chunks: gradients in the forward pass."""
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.12 and later
    columns = (problem.hidden, problem.weight, problem.targets)
    return torch.nn.functional.linear_cross_entropy(*columns, options=options)


def providers(device: str) -> list[Provider]:
    """Everything, the heaviest last."""
    return ours("triton" if device == "cuda" else "torch") + other_libraries() + eager()
