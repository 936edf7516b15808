"""Gradients of an update, however they are sharded: clipped, checked, dropped."""

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gvpo_lightning.distributed.gather import local_tensor
from gvpo_lightning.distributed.sharding import is_sharded


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


@torch.no_grad()
def clip_by_norm(parameters: Iterable[Tensor], max_norm: float) -> None:
    """Clip the gradients' total norm where some are plain, some sharded, some on other meshes: one norm a mesh."""
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
