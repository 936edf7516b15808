"""What is logged of an optimizer update; none of this waits for the device."""

from typing import Any

import torch

from gvpo_lightning.updates.loss import UpdateLoss
from gvpo_lightning.updates.meters import CollectedUpdate, measure_update


def update_metrics(loss: UpdateLoss, collected: CollectedUpdate, *, is_first: bool) -> dict[str, torch.Tensor]:
    """Float32 scalars in host memory by their logged names, over all ranks.

    `is_first`: it is the rollout's first update, which still trains the policy's own samples.
    """
    update, rollout, objective = loss.update, loss.rollout, loss.objective
    metrics: dict[str, Any] = measure_update(rollout, update.rows, collected.log_ratios, objective.beta)
    if collected.entropy is not None and update.rows:
        metrics["entropy"] = collected.entropy / int(rollout.batch.lengths[list(update.rows)].sum())
    metrics |= loss.metrics(collected)
    if objective.settings.kind == "gvpo" and not objective.settings.length_exponent:
        # of others the residual may be large: it is not what they train
        loss.training.guard.log_ratios(metrics["residual/rms"], metrics["reward/spread"])
    if is_first and "log_ratio/policy/mean" in metrics:  # only then are these the policy's own samples
        rollout.metrics["kl/reference"] = float(metrics["log_ratio/policy/mean"])
    metrics |= rollout.metrics
    metrics["group/dropped"] = float(update.num_dropped)
    metrics["update/passes"] = 2.0 if loss.needs_two_passes else 1.0
    # in host memory, or progress bar and loggers would wait for the device
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in metrics.items()}
