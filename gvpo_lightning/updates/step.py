"""`UpdateStep`: one optimizer update, from its first micro-batch to what came of it."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import local_tensor, root_stays_gathered
from gvpo_lightning.rollout.plan import Update
from gvpo_lightning.rollout.rollout import Rollout
from gvpo_lightning.updates.failed_update import save_update_of
from gvpo_lightning.updates.loss import UpdateLoss, UpdateRules
from gvpo_lightning.updates.meters import CollectedUpdate, UpdateMeter, measure_update


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """An optimizer passes over parameters without gradient: no momentum, no decay."""
    for parameter in parameters:
        parameter.grad = None


def gradients_are_finite(parameters: Iterable[Tensor], placement: Placement) -> Tensor:
    """Whether this rank's part of them is, a bool scalar on the device."""
    yes = torch.ones((), dtype=torch.bool, device=placement.device)
    if placement.scales_losses:
        return yes  # infinite float16 gradients are the loss scaler's own affair
    parts = [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]
    return torch.stack([yes, *(torch.isfinite(part).all() for part in parts)]).all()


@torch.no_grad()
def clip_sharded(parameters: Iterable[Tensor], max_norm: float, placement: Placement) -> None:
    """Clip the total norm of gradients that are sharded; where they are on several meshes, by one norm a mesh."""
    if placement.is_fsdp1:
        placement.strategy.model.clip_grad_norm_(max_norm)
        return
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    norms = []
    for members in by_mesh.values():
        norm = nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).float())
    if norms:
        total = torch.linalg.vector_norm(torch.stack(norms))
        for members in by_mesh.values():
            nn.utils.clip_grads_with_norm_(members, max_norm, total)


@dataclass(frozen=True)
class UpdateOutcome:
    """What came of an update, on all ranks the same.

    Attributes:
        metrics: what is logged.
        is_usable: all log-ratios are within the limit, and all gradients finite.
        is_trained: it is usable, and something in it counts; else its gradients must be dropped.
    """

    metrics: dict[str, Tensor]
    is_usable: bool
    is_trained: bool


class UpdateStep:
    """One update of a rollout on this rank; groups that are cut are given a pass without gradient first."""

    def __init__(self, policy: Any, update: Update, rollout: Rollout, rules: UpdateRules) -> None:
        self.policy, self.update, self.rollout, self.rules = policy, update, rollout, rules
        if update.over_limit:
            rules.guard.say(
                "over limit",
                f"A micro-batch of this rollout holds more than its {update.limits}: lengths are known "
                f"only now, and its update has only {len(update.micro_batches)} micro-batches a rank. "
                "Raise trainer.accumulate_grad_batches.",
            )
        if update.is_cut and rules.objective.couples_groups:
            rules.guard.info(
                "two passes",
                "Groups are cut over micro-batches or ranks: each such update makes a pass without gradient first, for "
                "the groups' means. Larger micro-batches (rollout.micro_batch_size, micro_batch_tokens), fewer of them "
                "(trainer.accumulate_grad_batches) or more prompts an update would save it.",
            )
        self._loss = UpdateLoss(policy, update, rollout, rules)
        self._meter = UpdateMeter()
        self._token_logprobs: list[Tensor] = []

    def micro_batch(self, slot: int) -> Tensor:
        """The loss of a micro-batch, scaled so that the update's gradient is that of one big batch."""
        with root_stays_gathered(self.policy) if self.rules.placement.is_sharded else nullcontext():
            result = self._loss.micro_batch(slot)
        self._token_logprobs.append(result.token_logprobs)
        self._meter.add(result.log_ratios, result.entropies, result.shares)
        return result.loss * self.update.scale

    def finish(self, parameters: Sequence[Tensor], *, is_first: bool) -> UpdateOutcome:
        """Measure the update over all ranks, once its gradients are there: the only wait for the device.

        `is_first`: it is its rollout's first.
        """
        placement, length = self.rules.placement, len(self.update.rows)
        are_finite = gradients_are_finite(parameters, placement)
        collected = self._meter.collect(self._loss.positions, length, are_finite, placement.ranks)
        within = bool((collected.log_ratios.abs() <= self.rules.max_log_ratio).all())
        is_usable = collected.gradients_are_finite and within
        metrics = update_metrics(self._loss, collected, is_first=is_first)
        return UpdateOutcome(metrics, is_usable, is_usable and self._loss.counts)

    def give_up(self, folder: Path, num_updates: int, num_skips: int) -> NoReturn:
        """Save this rank's part, before its gradients are dropped, and raise RuntimeError that says where it is."""
        saved = save_update_of(folder, self._loss, self._token_logprobs, num_updates)
        raise RuntimeError(
            f"{num_skips} updates in a row had log-ratios or gradients that are not finite, or log-ratios beyond "
            f"max_log_ratio={self.rules.max_log_ratio:g} (max_skipped_updates={num_skips - 1}): the policy has "
            "diverged. Lower the learning rate, or raise beta, and resume from an earlier checkpoint. The last such "
            f"update: {saved}"
        )


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
        loss.rules.guard.log_ratios(metrics["residual/rms"], metrics["reward/spread"])
    if is_first and "log_ratio/policy/mean" in metrics:  # only then are these the policy's own samples
        rollout.metrics["kl/reference"] = float(metrics["log_ratio/policy/mean"])
    metrics |= rollout.metrics
    metrics["group/dropped"] = float(update.num_dropped)
    metrics["update/passes"] = 2.0 if loss.needs_two_passes else 1.0
    # in host memory, or progress bar and loggers would wait for the device
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in metrics.items()}
