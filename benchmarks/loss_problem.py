"""The problem that `benchmarks.loss` times: random hidden states, a head, and groups of completions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gvpo_kernels import linear_logprob

BETA = 0.1
DROP_BELOW = 1e-4  # for the compaction row: leaves out the tokens that are nearly certain, 55% of them


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden features, vocabulary; `completions` of equal length in groups of `group_size`.

    `tied`: the weight is the embedding too, so that it gets a second gradient from the input side.
    """

    tokens: int
    hidden: int
    vocabulary: int
    completions: int = 16
    group_size: int = 8
    tied: bool = False

    def slice(self) -> "Shape":
        """A smaller problem of the same kind, on which float64 is affordable."""
        return replace(self, tokens=min(self.tokens, 256), vocabulary=min(self.vocabulary, 4096))


@dataclass(frozen=True)
class Problem:
    """Hidden (N, H), weight (V, H), targets (N,), and what the loss needs of the completions."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    reference_logprobs: Tensor
    cu_seqlens: Tensor
    rewards: Tensor
    group_ids: Tensor
    tied: bool = False

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The loss's arguments after the targets."""
        return self.reference_logprobs, self.cu_seqlens, self.rewards, self.group_ids, BETA

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers in another dtype."""
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def leaves(self, frozen_head: bool) -> "Problem":
        """Detached inputs that require the gradients asked for."""
        hidden = self.hidden.detach().requires_grad_()
        return replace(self, hidden=hidden, weight=self.weight.detach().requires_grad_(not frozen_head))

    def head_input(self) -> "Problem":
        """The problem as the head meets it: with a tied weight its input depends on the embedding of each token."""
        if not self.tied:
            return self
        embedded = torch.nn.functional.embedding(self.targets.roll(1), self.weight)
        return replace(self, hidden=self.hidden + 0.1 * embedded)


def make_problem(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Problem:
    """Random states of which 55% are nearly certain of their target, as most tokens of a trained model are."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = (normal(shape.vocabulary, shape.hidden) / shape.hidden**0.5).to(dtype)
    targets = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator, device=device)
    certain = (torch.rand(shape.tokens, 1, generator=generator, device=device) < 0.55).float()
    hidden = (normal(shape.tokens, shape.hidden) + 25 * certain * weight[targets].float()).to(dtype)
    index = torch.arange(shape.completions + 1, device=device)
    with torch.no_grad():
        logprobs = linear_logprob(hidden, weight, targets)
    assert isinstance(logprobs, Tensor)
    return Problem(
        hidden=hidden,
        weight=weight,
        targets=targets,
        reference_logprobs=logprobs.float() + 0.02 * normal(shape.tokens),
        cu_seqlens=(index * (shape.tokens // shape.completions)).to(torch.int32),
        rewards=torch.rand(shape.completions, generator=generator, device=device),
        group_ids=index[:-1] // shape.group_size,
        tied=shape.tied,
    )
