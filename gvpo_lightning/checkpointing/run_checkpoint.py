"""`RunCheckpoint`: Lightning's ModelCheckpoint for runs that are killed at any moment and resumed."""

import itertools
import os
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from gvpo_lightning.atomic import link_whole, remove_partials, remove_whole
from gvpo_lightning.checkpointing.save import disk_bytes, megabytes, save_whole

UNRANKED = "latest"  # a checkpoint that is kept for `last` alone, since the monitored metric did not choose it


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint of which no half is ever seen, and whose `last` is always the newest whole checkpoint.

    Takes ModelCheckpoint's arguments; `save_last` and `save_on_train_epoch_end` are true by default.

    * Files and folders (distributed checkpoints of ModelParallelStrategy) are written under a hidden name and renamed
      when all ranks are done. Leftovers of a killed save are removed at the next start.
    * `last.ckpt` is a symlink beside the checkpoint that it means, moved in one step before an older one is removed.
      `ckpt_path="last"` starts a run from the beginning where there is none yet, and says so.
    * It saves after whole optimizer updates, since a checkpoint within one can't be resumed.
    * A save that fails, as on a full disk, leaves `last` as it was and ends the run with `CheckpointError`.
    * The first save logs how large each kind of content is.

    On a remote file system (`s3://…`) it is Lightning's ModelCheckpoint.

    Raises:
        ValueError: settings under which a checkpoint would have to be overwritten in place.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        save_last: bool | None = True,
        save_on_train_epoch_end: bool | None = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath, save_last=save_last, save_on_train_epoch_end=save_on_train_epoch_end, **kwargs)
        if save_last and self.save_top_k == 0:
            raise ValueError(
                "RunCheckpoint's `last` is a link to a checkpoint that it keeps, but save_top_k=0 keeps none: set "
                "save_top_k=1."
            )
        if not self._enable_version_counter:
            raise ValueError(
                "RunCheckpoint never overwrites a checkpoint, but enable_version_counter=False asks for it: leave it "
                "out."
            )
        self._has_reported = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and remove what a killed run has left in it."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        if stage == "fit" and trainer.is_global_zero and self._is_local:
            remove_partials(self._folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after whole updates only; Lightning's may save within one after a resume, or when its time has come."""
        if not trainer.fit_loop._should_accumulate():
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.dirpath)

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Lightning's, less the folders that another callback may have left unfinished."""
        found = {path for path in super()._find_last_checkpoints(trainer) if _is_whole(path)}
        if not found:
            rank_zero_info("ckpt_path=last: there is no checkpoint yet, the run starts from the beginning.")
        return found

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: L.Trainer, del_filepath: str | None = None
    ) -> str:
        """A name that is free: not that of the checkpoint which this one takes the place of."""
        return super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not self._is_local:
            super()._save_checkpoint(trainer, filepath)
            return
        if self.save_last:
            # `last.ckpt`, or where an earlier run has left one, `last-v1.ckpt` and so on; it is part of what is saved
            self.last_model_path = self._free_path({}, self.CHECKPOINT_NAME_LAST, own=self.last_model_path)
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
        sizes = save_whole(trainer.strategy, checkpoint, Path(filepath))
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        if trainer.is_global_zero:
            if self.save_last:
                self._move_last(Path(filepath))
            if not self._has_reported:
                rank_zero_info(report(Path(filepath), sizes))
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))
        self._has_reported = True
        trainer.strategy.barrier("RunCheckpoint")

    def _free_path(self, candidates: dict[str, Tensor], name: str, own: str = "") -> str:
        for version in itertools.count():
            path = self.format_checkpoint_name(candidates, name, ver=version or None)
            if path == own or not self.file_exists(path, self._trainer):
                break
        return path

    def _move_last(self, checkpoint: Path) -> None:
        last = Path(self.last_model_path)
        before = last.parent / os.readlink(last) if last.is_symlink() else None
        link_whole(checkpoint, last)
        if before is not None and before != checkpoint and before.name.startswith(f"{UNRANKED}-"):
            remove_whole(before)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """`last` moves with every save; one is due only where the monitored metric has refused this step."""
        if not self._is_local:
            super()._save_last_checkpoint(trainer, monitor_candidates)
        elif self.save_last and self._last_global_step_saved != trainer.global_step:
            self._save_unranked(monitor_candidates)

    def _save_unranked(self, monitor_candidates: dict[str, Tensor]) -> None:
        self._save_checkpoint(self._trainer, self._free_path(monitor_candidates, UNRANKED + "-{step}"))

    def save_now(self) -> str:
        """Save, unless this step is saved already, and return what to resume from; every rank must call this."""
        trainer = self._trainer
        if self._last_global_step_saved != trainer.global_step:
            candidates = self._monitor_candidates(trainer)
            if self.monitor is None and self.save_top_k:
                self._save_topk_checkpoint(trainer, candidates)
            else:
                self._save_unranked(candidates)
        return self.last_model_path or self._last_checkpoint_saved

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not self._is_local:
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            remove_whole(Path(filepath))


def _is_whole(path: str) -> bool:
    """Whether this is a file, or a distributed checkpoint that its last file has been written to."""
    return not os.path.isdir(path) or os.path.exists(os.path.join(path, "meta.pt"))


def report(path: Path, sizes: dict[str, int]) -> str:
    """One line: the checkpoint's size on disk and, of it, each kind of content."""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())
    return f"checkpoint {path}: {megabytes(disk_bytes(path))} MB ({parts})"
