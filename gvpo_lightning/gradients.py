"""Gradients of an update, however they are sharded: clipped, checked, dropped."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor

from gvpo_lightning.sharding import clip_by_norm, is_sharded, local_tensor


def clip_gradients(
    module: L.LightningModule, optimizer: torch.optim.Optimizer, value: int | float | None, algorithm: str | None
) -> None:
    """As Lightning does; by norm also where the gradients are sharded."""
    strategy: Any = module.trainer.strategy
    if not value or algorithm == "value" or not is_sharded(strategy):
        module.clip_gradients(optimizer, value, algorithm)
    elif isinstance(strategy, FSDPStrategy):
        wrapped: Any = strategy.model
        wrapped.clip_grad_norm_(value)
    else:
        clip_by_norm(module.parameters(), value)


def drop_gradients(module: L.LightningModule) -> None:
    """An optimizer passes over parameters without gradient: no momentum, no decay."""
    for parameter in module.parameters():
        parameter.grad = None


def gradients_are_finite(module: L.LightningModule) -> Tensor:
    """Whether this rank's part of them is, a bool scalar on the device."""
    yes = torch.ones((), dtype=torch.bool, device=module.trainer.strategy.root_device)
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        return yes  # infinite float16 gradients are the loss scaler's own affair
    checks = [torch.isfinite(local_tensor(p.grad)).all() for p in module.parameters() if p.grad is not None]
    return torch.stack([yes, *checks]).all()
