"""What is logged of an optimizer update, gathered over micro-batches and ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gvpo_kernels import reward_statistics
from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.objectives.base import ObjectiveLoss
from gvpo_lightning.objectives.gvpo import gvpo_loss
from gvpo_lightning.rollout.rollout import Rollout

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


@dataclass(frozen=True)
class CollectedUpdate:
    """What is known of an update over all ranks.

    Attributes:
        log_ratios: one a completion, on the CPU.
        entropy: the sum over all tokens; None = not known.
        loss, num_clipped: the sums of the micro-batches' shares, where these were known.
        gradients_are_finite: on every rank.
    """

    log_ratios: Tensor
    entropy: float | None
    loss: float
    num_clipped: float
    gradients_are_finite: bool


@dataclass
class UpdateMeter:
    """Collects an update's log-ratios and entropies on the device; they reach the host once, all together."""

    log_ratios: list[Tensor] = field(default_factory=list)
    entropies: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def add(self, log_ratios: Tensor, entropies: Tensor | None, loss: ObjectiveLoss | None = None) -> None:
        """One micro-batch's (S,) log-ratios and, where they are known, its (N,) entropies and its share of the loss."""
        self.log_ratios.append(log_ratios.detach())
        if loss is not None:
            self.losses.append(torch.stack([value.detach().to(log_ratios) for value in loss]))
        if entropies is not None:
            self.entropies.append(entropies.detach().float().sum())

    @torch.no_grad()
    def collect(
        self, positions: Sequence[Sequence[int]], length: int, gradients_are_finite: Tensor, ranks: DataRanks
    ) -> "CollectedUpdate":
        """What is known of the update over all ranks: one exchange, and one transfer to the host.

        Args:
            positions: for each micro-batch, where its completions stand among the update's `length`.
            gradients_are_finite: bool scalar, this rank's.
        """
        entropy = torch.stack(self.entropies).sum() if self.entropies else self.log_ratios[0].new_zeros(())
        log_ratios = scatter(self.log_ratios, positions[: len(self.log_ratios)], length)
        loss = torch.stack(self.losses).sum(dim=0) if self.losses else log_ratios.new_zeros(2)
        rest = torch.stack([entropy.to(log_ratios), *loss.to(log_ratios), (~gradients_are_finite).to(log_ratios)])
        values = ranks.sum(torch.cat([log_ratios, rest]))
        ranks.sum_over_model(values[-1:])  # each of these ranks has other gradients, and all must skip together
        values = values.cpu()
        own_entropy, own_loss, num_clipped, bad = values[length:].tolist()
        return CollectedUpdate(
            values[:length],
            entropy=own_entropy if self.entropies else None,
            loss=own_loss,
            num_clipped=num_clipped,
            gradients_are_finite=bad == 0,
        )


@torch.no_grad()
def measure_update(rollout: Rollout, rows: Sequence[int], log_ratios: Tensor, beta: float) -> dict[str, Tensor]:
    """An update's metrics by their logged names.

    Args:
        rows: the completions of the rollout that it trained.
        log_ratios: (len(rows),) on the CPU.
        beta: with 0 there is no implicit reward, and nothing is said of it.
    """
    batch = rollout.micro_batch(rows, torch.device("cpu"))
    log_ratios = log_ratios if rows else torch.zeros(len(batch))
    reference, kept = batch.reference_logprobs.double().sum(dim=1), batch.kept
    # every completion as one token, in float64: a difference of two large sums
    result = gvpo_loss(
        (reference + log_ratios.double())[:, None],
        reference[:, None],
        kept[:, None],
        batch.rewards,
        batch.group_ids,
        beta or 1.0,
    )
    metrics = {"loss": result.loss, **result.metrics}
    del metrics["log_ratio/mean"], metrics["log_ratio/max"]  # by source, below
    if not beta:
        metrics = {name: value for name, value in metrics.items() if name.startswith("group/")}
    sources = [rollout.sources[row] for row in rows]
    for name in dict.fromkeys(sources):
        mine = kept & torch.tensor([source == name for source in sources])
        if bool(mine.any()):
            metrics |= _distribution(f"log_ratio/{name}", result.log_ratios[mine])
            if beta:
                metrics[f"residual/{name}/rms"] = result.residuals[mine].square().mean().sqrt()
    if beta:
        metrics["implicit_reward/spread"] = beta * _spread(result.log_ratios, batch.group_ids, kept)
    metrics["reward/spread"] = _spread(batch.rewards.double(), batch.group_ids, kept)
    return {name: value.float() for name, value in metrics.items()}


def scatter(parts: Sequence[Tensor], positions: Sequence[Sequence[int]], length: int) -> Tensor:
    """(length,) values of an update's completions from those of this rank's micro-batches; 0 for all others.

    Args:
        parts: one tensor a micro-batch; of an empty one, which holds a dropped completion, nothing is taken.
        positions: where each of its completions stands.
    """
    own = torch.cat([part[: len(where)] for part, where in zip(parts, positions, strict=True)])
    index = torch.tensor([position for where in positions for position in where], dtype=torch.int64)
    return own.new_zeros(length).index_copy_(0, index.to(own.device), own)


def _spread(values: Tensor, group_ids: Tensor, kept: Tensor) -> Tensor:
    """The largest difference of (S,) values within one group."""
    return reward_statistics(values, group_ids, kept).reward_range.max()


def _distribution(name: str, log_ratios: Tensor) -> dict[str, Tensor]:
    """Mean, standard deviation, largest absolute value and quantiles."""
    values = log_ratios.float()
    quantiles = values.sort().values
    return {
        f"{name}/mean": values.mean(),
        f"{name}/std": values.std(correction=0),
        f"{name}/max": values.abs().max(),
    } | {f"{name}/{label}": quantiles[round(share * (len(values) - 1))] for label, share in QUANTILES.items()}
