"""Checkpoints that are there whole or not at all: written under another name, flushed, renamed when all ranks are done.

A file and a folder (a distributed checkpoint) alike. What a killed process leaves is hidden and ends in `.partial`,
so that nothing takes it for a checkpoint, and is removed at the next start.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from gvpo_lightning.atomic import delete, partial_path, put_in_place
from gvpo_lightning.distributed.ranks import DataRanks

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is as it was."""


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes to where it is told to.

    Lightning's own goes by a copy in memory and one in the system's temporary folder, which may be smaller than a
    checkpoint, and where a killed process leaves it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a local file."""
        if storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with open(path, "wb") as file:
            torch.save(checkpoint, file)


def save_whole(strategy: Strategy, checkpoint: dict[str, Any], path: Path) -> dict[str, int]:
    """Save what a Trainer has dumped to a local file or folder; every rank must call this.

    Returns:
        The bytes of each kind of content, as `content_sizes` has them.

    Raises:
        CheckpointError: on every rank, if any could not write its part, with nothing left of it.
        ValueError: the trainer's plugin does not tell when a checkpoint is complete.
    """
    if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
        raise ValueError(
            "RunCheckpoint renames a checkpoint when it is complete, which AsyncCheckpointIO does not tell: leave the "
            "plugin out, or use Lightning's ModelCheckpoint."
        )
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = DirectCheckpointIO()
    sizes = content_sizes(checkpoint)
    partial = strategy.broadcast(partial_path(path))  # rank 0's
    error: BaseException | None = None
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        strategy.save_checkpoint(checkpoint, partial)
    except (Exception, CheckpointException) as exception:  # distributed checkpointing's own is no Exception
        error = exception
    _raise_together(error, strategy, path, partial, sizes)
    try:
        if strategy.is_global_zero:
            put_in_place(partial, path)
    except OSError as exception:
        error = exception
    _raise_together(error, strategy, path, partial, sizes)
    return sizes


def _raise_together(
    error: BaseException | None, strategy: Strategy, path: Path, partial: Path, sizes: dict[str, int]
) -> None:
    ranks = DataRanks(getattr(strategy, "global_rank", 0), getattr(strategy, "world_size", 1))
    reasons = ranks.gather(None if error is None else _reason(error))
    if not any(reasons):
        return
    if strategy.is_global_zero:
        delete(partial)
    strategy.barrier()
    free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
    rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason)
    raise CheckpointError(
        f"Checkpoint {path} could not be written: {reason} (rank {rank}). It needs "
        f"{megabytes(sum(sizes.values()))} MB, {megabytes(free)} MB are free there now that its part is removed. The "
        "one before it is whole: make room, or set the checkpoint callback's dirpath to another disk, and resume with "
        "ckpt_path=last."
    ) from error


def _reason(error: BaseException) -> str:
    """What the system said, of whatever torch made of it."""
    seen = list(_chain(error))
    for cause in seen:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return os.strerror(cause.errno)
    cause = next((cause for cause in seen if isinstance(cause, OSError)), error)
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, on other ranks too where distributed checkpointing has brought that along."""
    while error is not None:
        yield error
        for failure, _ in getattr(error, "failures", {}).values():
            yield from _chain(failure)
        error = error.__cause__ or error.__context__


def content_sizes(checkpoint: dict[str, Any]) -> dict[str, int]:
    """Bytes of a checkpoint's tensors by kind, in the whole of it where ranks hold parts; nothing is counted twice."""
    own = checkpoint.get("gvpo", {})
    named = {"policy": checkpoint["state_dict"], "optimizer": checkpoint.get("optimizer_states")}
    named |= {"rollout": own.get("rollout"), "replay": own.get("replay"), "reference": own.get("reference")}
    seen: set[int] = set()
    return {name: _tensor_bytes(value, seen) for name, value in named.items()}


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    if isinstance(value, Tensor):
        local = getattr(value, "_local_tensor", value)
        key = local.untyped_storage().data_ptr() if local.numel() else 0
        if key in seen:
            return 0
        seen.add(key)
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(_tensor_bytes(part, seen) for part in value)


def disk_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def megabytes(size: int) -> str:
    """In millions of bytes, with one decimal; 0 of nothing."""
    return f"{size / 1e6:.1f}" if size else "0"
