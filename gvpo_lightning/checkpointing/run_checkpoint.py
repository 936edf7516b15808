"""`RunCheckpoint`: Lightning's ModelCheckpoint for runs that are killed at any moment and resumed."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import proxy

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from gvpo_lightning.atomic import link_whole, remove_empty, remove_partials, remove_whole
from gvpo_lightning.checkpointing.save import CheckpointError, disk_bytes, megabytes, save_whole
from gvpo_lightning.checkpointing.whole import is_within_update, newest_last

UNRANKED = "latest"  # a checkpoint that is kept for `last` alone, since the monitored metric did not choose it


class RunCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint of which no half is ever seen, and whose `last` is always the newest whole checkpoint.

    Takes ModelCheckpoint's arguments; `save_last` and `save_on_train_epoch_end` are true by default.

    * Files and folders (distributed checkpoints of ModelParallelStrategy) are written under a hidden name and renamed
      when all ranks are done. Leftovers of a killed save are removed at the next start.
    * `last.ckpt` is a symlink to the checkpoint that it means, moved in one step before an older one is removed.
      `ckpt_path="last"` starts a run from the beginning where there is none yet, and says so; one that leads nowhere
      is an error which names the whole checkpoints.
    * It saves after whole optimizer updates, since a checkpoint within one can't be resumed: a save that comes due
      within one waits for its end. `save_on_exception` saves where the exception came between two, on one device.
    * A run that is resumed from a checkpoint in its folder takes up the bookkeeping too, wherever that was moved.
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
        self._is_waiting = False  # a validation within an update has ended, and what it would save is not saved yet

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and remove what a killed run has left in it."""
        super().setup(trainer, pl_module, stage)
        self._trainer = trainer
        if stage == "fit" and trainer.is_global_zero and self._is_local:
            remove_partials(self._folder, deeply="/" in (self.filename or ""))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ModelCheckpoint; where the run's folder was moved, with the paths of what lies in it now."""
        if state_dict.get("dirpath") != self.dirpath and self._resumes_here:
            state_dict = moved(state_dict, str(self.dirpath))
            kept = {p: s for p, s in state_dict["best_k_models"].items() if self.file_exists(p, self._trainer)}
            state_dict = state_dict | {"best_k_models": kept}
        super().load_state_dict(state_dict)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the folder's `last`, which is of the run that is resumed, whatever else has changed since."""
        super().on_train_start(trainer, pl_module)
        self._is_waiting = False
        if self.save_last and not self.last_model_path and self._resumes_here:
            last = self.format_checkpoint_name({}, self.CHECKPOINT_NAME_LAST)
            self.last_model_path = trainer.strategy.broadcast(last if os.path.islink(last) else "")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after whole updates only; Lightning's may save within one after a resume, or when its time has come."""
        if self.is_within_update:
            return
        if self._is_waiting:
            self._is_waiting = False
            super().on_validation_end(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, or if this is within an update, at its end."""
        self._is_waiting = trainer.state.fn == "fit" and not trainer.sanity_checking and self.is_within_update
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As ModelCheckpoint, unless training has been stopped within an update."""
        if not self.is_within_update:
            super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """With `save_on_exception`: save what is whole. Another rank may be elsewhere, and a full disk stays full."""
        if trainer.state.fn != "fit" or not self._should_save_on_exception(trainer):
            return
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        is_whole = current.completed == current.processed and not self.is_within_update  # the scheduler's step as well
        # a validation of averaged weights has put them in the policy's place, and each would be saved as the other
        is_swapped = trainer.validating and any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if is_whole and not is_swapped and trainer.world_size == 1 and not isinstance(exception, CheckpointError):
            rank_zero_info(f"A {type(exception).__name__} was raised, what is trained is saved: {self.save_now()}")

    @property
    def is_within_update(self) -> bool:
        """Whether this is a moment at which nothing is saved."""
        return is_within_update(self._trainer.fit_loop.epoch_loop, self._trainer.accumulate_grad_batches)

    def _should_skip_saving_checkpoint(self, trainer: L.Trainer) -> bool:
        return super()._should_skip_saving_checkpoint(trainer) or self.is_within_update

    @property
    def _resumes_here(self) -> bool:
        """Whether the run goes on from a checkpoint in this callback's own folder; every rank must call this."""
        path = self._trainer.ckpt_path
        if path is None or not self._is_local or "://" in str(path):
            return False
        inside = self._folder.resolve() in Path(path).resolve().parents
        return self._trainer.strategy.broadcast(inside)

    @property
    def _is_local(self) -> bool:
        return "://" not in str(self.dirpath)

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """The newest of Lightning's; FileNotFoundError where it is not whole."""
        found = super()._find_last_checkpoints(trainer)
        if any("://" in path for path in found):
            return found
        newest = newest_last(map(Path, found))
        if newest is None:
            rank_zero_info("ckpt_path=last: there is no checkpoint yet, the run starts from the beginning.")
        return set() if newest is None else {str(newest)}

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: L.Trainer, del_filepath: str | None = None
    ) -> str:
        """A name that is free: not that of the checkpoint which this one takes the place of."""
        return super()._get_metric_interpolated_filepath_name(monitor_candidates, trainer)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        assert not self.is_within_update, "what is saved within an update can't be resumed"
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
        return self.resume_path

    @property
    def resume_path(self) -> str:
        """What to resume from, of all that this fit has saved; "" where it has saved nothing."""
        return self._last_checkpoint_saved and (self.last_model_path or self._last_checkpoint_saved)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not self._is_local:
            super()._remove_checkpoint(trainer, filepath)
        elif trainer.is_global_zero:
            remove_whole(Path(filepath))
            remove_empty(Path(filepath).parent, self._folder)  # a filename with slashes makes folders


def check_savers(callbacks: Iterable[object], accumulate: int, *, validates_by_time: bool) -> None:
    """Raise ValueError for a ModelCheckpoint that may save within an update and can't wait, as a RunCheckpoint does."""
    for callback in callbacks:
        if accumulate == 1 or not isinstance(callback, ModelCheckpoint) or isinstance(callback, RunCheckpoint):
            continue
        by_time = callback._train_time_interval is not None and "its train_time_interval is over"
        after = validates_by_time and not callback._save_on_train_epoch_end and "a validation by the clock has ended"
        if when := by_time or after:
            raise ValueError(
                f"A {type(callback).__name__} that saves when {when} may do so within an optimizer update of "
                f"accumulate_grad_batches={accumulate}, from where a run can't go on: use "
                "gvpo_lightning.callbacks.RunCheckpoint with the same arguments, which waits for the update's end."
            )


def moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a ModelCheckpoint has saved, as if its folder had always been this one."""
    before = Path(state.get("dirpath") or ".")

    def there(path: str) -> str:
        is_inside = bool(path) and Path(path).is_relative_to(before)
        return str(Path(folder, Path(path).relative_to(before))) if is_inside else path

    paths = {name: there(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    models = {there(path): score for path, score in state["best_k_models"].items()}
    return state | paths | {"best_k_models": models, "dirpath": folder}


def report(path: Path, sizes: dict[str, int]) -> str:
    """One line: the checkpoint's size on disk and, of it, each kind of content."""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items())
    return f"checkpoint {path}: {megabytes(disk_bytes(path))} MB ({parts})"
