"""`Preemption`: a SIGTERM or failed rewards end a run between two updates, with a checkpoint to go on from."""

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gvpo_lightning.checkpointing.resumption import COMMAND, call_that_resumes
from gvpo_lightning.checkpointing.run_checkpoint import RunCheckpoint, check_savers
from gvpo_lightning.checkpointing.save import save_whole
from gvpo_lightning.checkpointing.whole import is_whole, is_within_update
from gvpo_lightning.rewards import RewardError

STATUS = 128 + signal.SIGTERM  # 143: what a shell reports of a process that SIGTERM has ended
REPEAT = 5.0  # seconds within which another SIGTERM is the same one, by another way


class Preemption(L.Callback):
    """Saves a checkpoint and ends the process with status 143 after SIGTERM, on one rank or several.

    What is being done is finished first: the optimizer update, with the rollout that it may need, or the validation.
    Then all ranks agree, save through the run's `RunCheckpoint`, or else any ModelCheckpoint with save_last, or else
    to `stopped-step=N.ckpt` in the trainer's default_root_dir, and stop. Nothing is evaluated or exported. The
    resumed run ends as if it had not been stopped. Before the first update there is nothing to save.

    Rewards that stop a run (`RewardError`, which all ranks raise together) do so between two updates: what has been
    trained is saved in the same way, and the run can go on when the reward is mended.

    A run that any exception, SIGTERM or Ctrl-C has ended says how it is resumed: the last note of the exception, or the
    last line of the log, is the call, and under `gvpo` the last line on stderr is the command. A stop that something
    else asks for within an update (`Trainer(max_time=…)`, `EarlyStopping`) waits for the update's end.

    A scheduler that kills soon after SIGTERM must leave time for one rollout, one update and one checkpoint. A second
    SIGTERM, 5 seconds or more after the first, kills at once.

    `GVPOModule` brings this callback along; one in the Trainer's callbacks takes its place. The signal's handlers
    that were there before `fit` are called too. Processes that Lightning's launcher has started end with status 0,
    since it kills the others where one of them fails; the one that started them ends with 143.
    """

    def __init__(self) -> None:
        self._received = 0.0  # when, by time.monotonic
        self._trainer: L.Trainer | None = None
        self._has_begun = False  # what comes before are mistakes in the settings
        self._should_stop = False  # when the update is finished
        self._saved = ""  # by none of the checkpoint callbacks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of Lightning's own reaction, before it is registered."""
        connector = trainer._signal_connector
        vars(connector).pop("_sigterm_notifier_fn", None)
        if stage == "fit":
            # Lightning's own broadcasts within the handler, where other ranks may be in another collective
            connector._sigterm_notifier_fn = self._notify  # type: ignore[method-assign,assignment]
            self._received, self._trainer = 0.0, trainer
            self._has_begun, self._should_stop, self._saved = False, False, ""
            by_time = getattr(trainer, "_val_check_time_interval", None) is not None
            check_savers(trainer.checkpoint_callbacks, trainer.accumulate_grad_batches, validates_by_time=by_time)

    def _notify(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            self._received = now
        elif now - self._received >= REPEAT:
            assert self._trainer is not None
            if self._trainer.strategy.launcher is not None:
                self._trainer.strategy.launcher.kill(signal.SIGKILL)
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What stops this is no mistake in the settings."""
        self._has_begun = True

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Some settings are yet to be checked."""
        self._has_begun = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where evaluation before training was interrupted, there is nothing to save."""
        if self._is_due():
            self._stop("nothing has been trained yet")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From now on there is something to go on with."""
        self._has_begun = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after a whole update: a checkpoint within one would lose gradients."""
        self._stop_or_wait()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the next rollout."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_or_wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what has been trained before rewards failed, and say how to go on."""
        if trainer.state.fn != "fit" or self._trainer is None:  # no callback has been set up
            return
        can_save = trainer.global_step and not trainer.fast_dev_run and not self._is_within_update  # type: ignore[attr-defined]
        if isinstance(exception, RewardError) and can_save:
            exception.add_note(f"Stopped at step {trainer.global_step}: resume with ckpt_path={self._save()}.")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):  # whose turn comes later, when it would be too late to be told of
                callback.on_exception(trainer, pl_module, exception)
        if not self._has_begun and isinstance(exception, Exception):
            return
        path, command = self._newest(), COMMAND.get()
        if command is not None:
            if trainer.is_global_zero:
                command.stopped(path)
        elif isinstance(exception, Exception):
            exception.add_note(call_that_resumes(path))
        else:
            rank_zero_info(call_that_resumes(path))

    def _stop_or_wait(self) -> None:
        """What asks for a stop, a signal or another callback, is heeded between two updates."""
        trainer = self._run
        if self._is_within_update:
            self._should_stop |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._should_stop
        self._should_stop = False
        if self._is_due():
            self._save_and_stop()

    @property
    def _is_within_update(self) -> bool:
        return is_within_update(self._run.fit_loop.epoch_loop, self._run.accumulate_grad_batches)

    @property
    def _run(self) -> L.Trainer:
        assert self._trainer is not None, "there is no fit"
        return self._trainer

    def _is_due(self) -> bool:
        """Whether any rank has received the signal; every rank must call this."""
        return self._run.strategy.reduce_boolean_decision(bool(self._received), all=False)

    def _save_and_stop(self) -> None:
        path = None if self._run.fast_dev_run else self._save()  # type: ignore[attr-defined]
        self._stop(f"resume with ckpt_path={path}")

    def _save(self) -> str:
        trainer = self._run
        callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        for callback in callbacks:
            if isinstance(callback, RunCheckpoint):
                return callback.save_now()
        for callback in callbacks:
            if callback.save_last:
                callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
                return callback.last_model_path
        path = Path(trainer.default_root_dir) / f"stopped-step={trainer.global_step}.ckpt"
        save_whole(trainer.strategy, trainer._checkpoint_connector.dump_checkpoint(False), path)
        self._saved = str(path)
        return self._saved

    def _newest(self) -> str | None:
        """The newest whole checkpoint that this fit has saved, else the one that it has started from."""
        trainer = self._run
        saved = {self._saved}
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback.save_weights_only:
                saved.add(
                    callback.resume_path if isinstance(callback, RunCheckpoint) else callback._last_checkpoint_saved
                )
        found = [path for path in saved if _is_there(path)]
        if found:
            return max(found, key=lambda path: 0 if "://" in path else os.lstat(path).st_mtime_ns)
        start = str(trainer.ckpt_path or "")
        return start if _is_there(start) else None

    def _stop(self, message: str) -> None:
        trainer = self._run
        rank_zero_info(f"SIGTERM: stopped at step {trainer.global_step} with status {STATUS}, {message}.")
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = environment is not None and not environment.creates_processes_externally
        raise SIGTERMException(0 if is_child and trainer.local_rank else STATUS)


def _is_there(path: str) -> bool:
    """Whether this is a whole checkpoint, as far as it can be seen from here."""
    return bool(path) and ("://" in path or is_whole(path))
