"""Collectives that also work without a process group."""

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks; every rank must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
