"""What is logged of an optimizer update, gathered over its micro-batches."""

import torch
from torch import Tensor

from gvpo_kernels import FusedLoss
from gvpo_lightning.batch import CompletionBatch
from gvpo_lightning.objectives import gvpo_loss


class UpdateMeter:
    """Collects an update's completions on the device; `compute` empties it, with one pass over (S,) tensors."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.reset()

    def reset(self) -> None:
        """Forget what has been added."""
        self._parts: list[tuple[Tensor, ...]] = []
        self._entropy: list[Tensor] = []

    @torch.no_grad()
    def add(self, batch: CompletionBatch, result: FusedLoss) -> None:
        """One micro-batch and its loss."""
        self._parts.append(
            (
                batch.unpack(result.token_logprobs).sum(dim=1),
                batch.reference_logprobs.sum(dim=1),
                batch.kept,
                batch.rewards,
                batch.group_ids,
            )
        )
        if result.entropies is not None:
            self._entropy.append(result.entropies)

    @torch.no_grad()
    def compute(self, num_groups: int, world_size: int) -> dict[str, Tensor]:
        """The update's metrics by their logged names; the mean of `loss` over the ranks is the global loss."""
        sequence, reference, kept, rewards, group_ids = (torch.cat(column) for column in zip(*self._parts, strict=True))
        # a completion as one token: for metrics the difference of sums is exact enough
        result = gvpo_loss(
            sequence[:, None], reference[:, None], kept[:, None], rewards, group_ids, self.beta, num_groups=num_groups
        )
        metrics = {"loss": result.loss * world_size, **result.metrics}
        for name in ("log_ratio/mean", "log_ratio/max"):
            metrics[name.replace("/", "/policy/")] = metrics.pop(name)
        if self._entropy:
            metrics["entropy"] = torch.cat(self._entropy).mean()
        self.reset()
        return metrics
