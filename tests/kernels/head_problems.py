"""Small heads and batches of completions, and the error budget that every path is held to."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels import fused_gvpo_loss, linear_logprob
from tests.error_budget import assert_within, sum_budget


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


# of a number on its way through a head alone: one product of a few dozen terms, a softmax, and one product back
HEAD_ROUNDINGS = 2**5


def assert_rounded_alone(ours: dict, truth: dict, problem: Problem):
    """Float32 `logprob_results` differ from float64's by roundings of what is summed, however much of it cancels."""
    assert ours.keys() == truth.keys()
    hidden, weight = problem.hidden.double(), problem.weight.double()
    bias = torch.zeros(len(weight), device=weight.device) if problem.bias is None else problem.bias.double()
    logits = hidden @ weight.T + bias
    logits = logits if problem.softcap is None else problem.softcap * torch.tanh(logits / problem.softcap)
    # the sizes of the terms of logits, of p - 1 or p times the upstream gradient, and of the gradients made of these
    of_logits = (hidden.abs() @ weight.abs().T + bias.abs()) / problem.temperature
    of_tokens = 1 + 2 * of_logits.amax(dim=1)
    p = (logits / problem.temperature).softmax(dim=1)
    hits = torch.nn.functional.one_hot(problem.targets, len(weight))
    upstream = uneven(len(hidden), hidden).abs() / problem.temperature
    of_grad_logits = (upstream * of_tokens)[:, None] * (p + hits)
    sizes = {
        "logprobs": of_tokens,
        "entropies": of_tokens,
        "grad_hidden": of_grad_logits @ weight.abs(),
        "grad_weight": of_grad_logits.T @ hidden.abs(),
        "grad_bias": of_grad_logits.sum(dim=0),
    }
    for name, expected in truth.items():
        # no result is more than its dtype can hold: what underflows is 0
        budget = sum_budget(sizes[name], roundings=HEAD_ROUNDINGS) + torch.finfo(torch.float32).tiny
        assert_within(ours[name], expected, budget, name)


def assert_close(ours: dict, truth: dict, tolerance: float):
    """Largest difference relative to the largest entry: for float64, or far above what float32 rounds."""
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.numel():
            error = float((ours[name].double() - expected.double()).abs().max())
            assert error <= tolerance * max(float(expected.abs().max()), 1e-6), f"{name}: {error}"
