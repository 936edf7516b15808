"""Small heads and batches of completions, and the error budget that every path is held to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels import fused_gvpo_loss, linear_logprob


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    softcap: float | None = None
    trained: tuple[str, ...] = ("hidden", "weight", "bias")

    def to(self, dtype: torch.dtype) -> "Problem":
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def leaves(self) -> dict[str, Tensor]:
        tensors = {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}
        return {n: t.clone().requires_grad_(n in self.trained) for n, t in tensors.items() if t is not None}

    @property
    def head(self) -> dict:
        return {"temperature": self.temperature, "softcap": self.softcap}


def make_problem(
    num_tokens, vocab_size, hidden_size, *, bias=False, scale=1.0, seed=0, device="cpu", **head
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    targets = torch.randint(vocab_size, (num_tokens,), generator=generator).to(device)
    weight = normal(vocab_size, hidden_size) * scale / max(hidden_size, 1) ** 0.5
    return Problem(normal(num_tokens, hidden_size), weight, targets, normal(vocab_size) if bias else None, **head)


def logprob_results(problem: Problem, implementation: str, upstream: Tensor | None = None) -> dict:
    """Log-probs, entropies and gradients under a non-uniform upstream gradient with zeros in it."""
    leaves = problem.leaves()
    logprobs, entropies = linear_logprob(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        bias=leaves.get("bias"),
        return_entropy=True,
        implementation=implementation,
        **problem.head,
    )
    if upstream is None:
        upstream = uneven(len(logprobs), logprobs)
    logprobs.backward(upstream.to(logprobs.dtype))
    results = {"logprobs": logprobs.detach(), "entropies": entropies}
    return results | {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def uneven(length: int, like: Tensor) -> Tensor:
    upstream = torch.linspace(-1, 2, length, dtype=torch.float64, device=like.device)
    upstream[::4] = 0
    return upstream


@dataclass(frozen=True)
class Completions:
    reference_logprobs: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    group_ids: Tensor
    beta: float = 0.1


def make_completions(lengths, group_ids, *, seed=0, device="cpu", level=-4.0) -> Completions:
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()
    reference = level + 0.5 * torch.randn(sum(lengths), generator=generator, dtype=torch.float64)
    rewards = torch.rand(len(lengths), generator=generator, dtype=torch.float64)
    rewards[torch.tensor(lengths) == 0] = torch.nan
    ids = torch.tensor(group_ids, dtype=torch.int64)
    return Completions(*(t.to(device) for t in (reference, cu_seqlens, rewards, ids)))


def loss_results(problem: Problem, batch: Completions, implementation: str, *, upstream=3.0, **options) -> dict:
    """Everything that `fused_gvpo_loss` returns, and the gradients of `upstream` times the loss."""
    leaves = problem.leaves()
    record = fused_gvpo_loss(
        leaves["hidden"],
        leaves["weight"],
        problem.targets,
        batch.reference_logprobs,
        batch.cu_seqlens,
        batch.rewards,
        batch.group_ids,
        batch.beta,
        bias=leaves.get("bias"),
        implementation=implementation,
        **problem.head,
        **options,
    )
    (record.loss * upstream).backward()
    results = {name: getattr(record, name).detach() for name in ("loss", "token_logprobs", "log_ratios", "residuals")}
    results["dropped_mass"] = record.dropped_mass
    return results | {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}


def assert_within_budget(ours: dict, eager: dict, truth: dict, factor=1.5):
    """|ours - float64| <= factor |eager in the same dtype - float64| + a few roundings of the result's dtype."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        actual, expected = ours[name].double(), expected.double()
        assert actual.shape == expected.shape, name
        tiny = 8 * torch.finfo(ours[name].dtype).eps * float(expected.abs().max()) if expected.numel() else 0.0
        error, allowed = (float((r.double() - expected).norm()) for r in (actual, eager[name]))
        budget = factor * allowed + tiny + 1e-30
        assert error <= budget, f"{name}: error {error:.3g} is above its budget {budget:.3g}"


def assert_close(ours: dict, truth: dict, tolerance: float):
    """Largest difference relative to the largest entry."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.numel():
            error = float((ours[name].double() - expected.double()).abs().max())
            assert error <= tolerance * max(float(expected.abs().max()), 1e-6), f"{name}: {error}"
