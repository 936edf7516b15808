"""What the tests of the objective share: random batches, and the loss written naively from its definition."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The arguments of `gvpo_loss`, in its order: `gvpo_loss(*batch)`."""

    token_logprobs: Tensor
    reference_logprobs: Tensor
    completion_mask: Tensor
    rewards: Tensor
    group_ids: Tensor
    beta: float

    def rows(self, rows) -> "Batch":
        return Batch(*(tensor[rows] for tensor in self[:5]), self.beta)

    def to(self, dtype: torch.dtype) -> "Batch":
        floats = {name: getattr(self, name).detach().to(dtype) for name in ("token_logprobs", "reference_logprobs")}
        return self._replace(**floats)


def random_batch(sizes=(3, 5, 2), *, num_tokens=6, dropped=0, beta=0.3, seed=0, garbage=0.0) -> Batch:
    """Ragged completions of groups of `sizes`, rows shuffled; `garbage` fills what the mask leaves out.

    Of every group `dropped` more completions exist, with an all-zero mask and a NaN reward.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(sizes) + dropped * len(sizes)
    ids = torch.randperm(1000, generator=generator)[: len(sizes)] * 12_345_678_901 - 10**12
    group_ids = torch.cat([ids[g].repeat(size + dropped) for g, size in enumerate(sizes)])
    kept = torch.cat([torch.arange(size + dropped) < size for size in sizes])
    lengths = torch.randint(1, num_tokens + 1, (num_rows,), generator=generator) * kept
    mask = torch.arange(num_tokens) < lengths[:, None]
    policy, reference = (
        torch.where(mask, -3 * torch.rand(num_rows, num_tokens, generator=generator, dtype=torch.float64), garbage)
        for _ in range(2)
    )
    rewards = torch.where(kept, torch.randn(num_rows, generator=generator, dtype=torch.float64), math.nan)
    batch = Batch(policy, reference, mask, rewards, group_ids, beta)
    batch = batch.rows(torch.randperm(num_rows, generator=generator))
    batch.token_logprobs.requires_grad_()
    return batch


def naive_group_losses(batch: Batch) -> list[Tensor]:
    """L_g of every group with two or more completions: plain loops, float64, no detaching, no vectorising."""
    groups: dict[int, list[tuple[Tensor, float]]] = {}
    for row, group in enumerate(batch.group_ids.tolist()):
        tokens = [token for token in range(batch.completion_mask.shape[1]) if batch.completion_mask[row, token]]
        if tokens:
            log_ratio = torch.zeros((), dtype=torch.float64)
            for token in tokens:
                policy, reference = batch.token_logprobs[row, token], batch.reference_logprobs[row, token]
                log_ratio = log_ratio + (policy.double() - reference.double())
            groups.setdefault(group, []).append((log_ratio, float(batch.rewards[row])))
    losses = []
    for members in groups.values():
        size = len(members)
        if size >= 2:
            mean_log_ratio = sum(log_ratio for log_ratio, _ in members) / size
            mean_reward = sum(reward for _, reward in members) / size
            residuals = [batch.beta * (ratio - mean_log_ratio) - (reward - mean_reward) for ratio, reward in members]
            losses.append(sum(residual**2 for residual in residuals) / (2 * (size - 1)))
    return losses


def naive_loss(batch: Batch) -> Tensor:
    """The mean of the group losses; 0, connected to the graph, where there is none."""
    losses = naive_group_losses(batch)
    return sum(losses, start=batch.token_logprobs[:0].double().sum()) / max(len(losses), 1)


def gradient(loss: Tensor, batch: Batch) -> Tensor:
    """d loss / d token_logprobs."""
    (grad,) = torch.autograd.grad(loss, batch.token_logprobs)
    return grad


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=rtol, atol=atol)
