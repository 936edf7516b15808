"""What `benchmarks.kernel` times: our paths, eager torch, and other libraries' losses.

A provider turns a problem into a scalar loss (or, forward only, into log-probs). Those of other libraries cannot
couple the completions of a group: they compute the mean cross-entropy, and are held to that truth instead.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gvpo_kernels import fused_gvpo_loss, group_loss, linear_logprob


@dataclass(frozen=True)
class Problem:
    """Hidden (N, H), weight (V, H) and completions: 16 of N / 16 tokens, in 2 groups of 8."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    reference_logprobs: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    group_ids: Tensor
    drop_below: float = 0.0

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The loss's arguments after the targets."""
        return self.reference_logprobs, self.cu_seqlens, self.rewards, self.group_ids, 0.1

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype."""
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))


def make_problem(
    num_tokens: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, device: str, seed: int = 0
) -> Problem:
    """Random states of which 55% are nearly certain of their target, as most tokens of a trained model are."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocab_size, hidden_size, generator=generator) / hidden_size**0.5
    targets = torch.randint(vocab_size, (num_tokens,), generator=generator)
    certain = (torch.rand(num_tokens, 1, generator=generator) < 0.55).float()
    hidden = torch.randn(num_tokens, hidden_size, generator=generator) + 25 * certain * weight[targets]
    problem = Problem(
        hidden=hidden.to(device, dtype),
        weight=weight.to(device, dtype),
        targets=targets.to(device),
        reference_logprobs=torch.zeros(num_tokens, device=device),
        cu_seqlens=(torch.arange(17) * (num_tokens // 16)).to(device, torch.int32),
        rewards=torch.rand(16, generator=generator).to(device),
        group_ids=torch.arange(16).to(device) // 8,
    )
    noise = 0.02 * torch.randn(num_tokens, generator=generator).to(device)
    return replace(problem, reference_logprobs=our_logprobs(problem).float() + noise)


def our_logprobs(problem: Problem, implementation: str = "auto") -> Tensor:
    """Our forward pass."""
    logprobs = linear_logprob(problem.hidden, problem.weight, problem.targets, implementation=implementation)
    assert isinstance(logprobs, Tensor)
    return logprobs


@dataclass(frozen=True)
class Provider:
    """One row of the table; `truth` is what its gradients should be."""

    name: str
    implementation: str
    mode: str
    run: Callable[[Problem], Tensor]
    backward: bool = True
    frozen_head: bool = False
    truth: str = "gvpo"


def ours(implementation: str) -> list[Provider]:
    """Our function in every mode."""

    def loss(problem: Problem, **options: Any) -> Tensor:
        columns = (problem.hidden, problem.weight, problem.targets, *problem.batch)
        return fused_gvpo_loss(*columns, implementation=implementation, **options).loss

    def row(mode: str, run: Callable[[Problem], Tensor], **more: Any) -> Provider:
        return Provider("ours", implementation, mode, run, **more)

    return [
        row("recompute", lambda p: loss(p, mode="recompute")),
        row("stash", lambda p: loss(p, mode="stash")),
        row("compaction", lambda p: loss(p, drop_below=p.drop_below)),
        row("frozen head", loss, frozen_head=True),
        row("forward only", lambda p: our_logprobs(p, implementation), backward=False),
    ]


def eager_logprobs(problem: Problem) -> Tensor:
    """All logits stored in the input dtype, their log-softmax in float32 (float64)."""
    logits = problem.hidden @ problem.weight.T
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits.to(wide), dim=-1).gather(-1, problem.targets[:, None]).squeeze(-1)


def eager_loss(problem: Problem) -> Tensor:
    """The loss of `eager_logprobs`."""
    return group_loss(eager_logprobs(problem), *problem.batch, implementation="torch").loss


def cross_entropy(problem: Problem) -> Tensor:
    """What providers of other libraries compute."""
    return -eager_logprobs(problem).mean()


def eager(compiled: bool) -> list[Provider]:
    """Plain torch, and torch.compile'd where asked."""
    rows = [
        Provider("eager", "torch", "all logits", eager_loss),
        Provider("eager", "torch", "frozen head", eager_loss, frozen_head=True),
        Provider("eager", "torch", "forward only", eager_logprobs, backward=False),
    ]
    if compiled:
        function = torch.compile(eager_logprobs)

        def run(problem: Problem) -> Tensor:
            return group_loss(function(problem), *problem.batch, implementation="torch").loss

        rows.append(Provider("eager", "torch.compile", "all logits", run))
    return rows


def other_libraries(device: str) -> list[Provider]:
    """Mean cross-entropy of torch's chunked function and, on CUDA, of what is installed."""

    def row(name: str, implementation: str, run: Callable[[Problem], Tensor]) -> Provider:
        return Provider(name, implementation, "mean cross-entropy", run, truth="cross-entropy")

    rows = []
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        function, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
        run = lambda p: function(p.hidden, p.weight, p.targets, options=options)  # noqa: E731
        rows.append(row("F.linear_cross_entropy", "torch, options", run))
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        rows.append(row("liger-kernel", "triton", lambda p: liger(p.weight, p.hidden, p.targets)))
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        rows.append(row("cut-cross-entropy", "triton", lambda p: linear_cross_entropy(p.hidden, p.weight, p.targets)))
    return rows


def providers(device: str, compiled: bool) -> list[Provider]:
    """Everything that can run on `device`, the heaviest last."""
    return ours("triton" if device == "cuda" else "torch") + other_libraries(device) + eager(compiled)
