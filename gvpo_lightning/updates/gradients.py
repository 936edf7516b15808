"""Gradients of an update, however they are sharded: clipped, checked, dropped."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.distributed.sharding import local_tensor


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
