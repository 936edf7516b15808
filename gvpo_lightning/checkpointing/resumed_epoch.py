"""Lightning's progress through epochs, where a run is resumed at an epoch's end or with epochs of another length."""

from typing import Any

from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.loop import _Loop

from gvpo_lightning.rollout.epoch import Epoch


def correct_progress(loop_state: dict[str, Any]) -> None:
    """Let a checkpoint's `fit_loop` count what has been trained, and nothing else.

    An epoch that was stopped before its last batch, as by `max_steps`, goes on: Lightning counts it as a whole one, and
    would end a resumed run as many batches too early. A batch that an exception has ended before it was trained, as of
    a reward that failed on its rollout, is still to come: validations that are counted over epochs would be early.
    """
    batches, epochs = loop_state["epoch_loop.batch_progress"], loop_state["epoch_progress"]
    if batches["current"]["ready"] > batches["current"]["processed"]:
        for counts in (batches["total"], batches["current"]):
            counts["ready"] = counts["started"] = counts["processed"]
        batches["is_last_batch"] = False
    has_ended = 0 < epochs["current"]["ready"] == epochs["current"]["processed"]
    if has_ended and not batches["is_last_batch"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["processed"] -= 1
            counts["completed"] = counts["processed"]


def begin_epoch(fit_loop: _FitLoop, epoch: Epoch, microstep: int, num_prompts: int) -> None:
    """Let a resumed run begin the next epoch where the saved one is over, or anew one that can't go on.

    Called before the first batch is taken. Of a checkpoint saved at an epoch's end Lightning would, with `max_steps`,
    train one batch more as that epoch's; of another length, it would go on at the saved number of batches.

    Args:
        fit_loop: the Trainer's, with the progress from the checkpoint.
        epoch, microstep: the run's, from the checkpoint.
        num_prompts: that there are now.
    """
    epoch_loop = fit_loop.epoch_loop
    if not fit_loop.is_resuming:
        return
    if not fit_loop.restarted_mid_epoch:
        if fit_loop.restarted_on_epoch_end:
            fit_loop.epoch_progress.increment_completed()
        _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]  # whose own setter ignores it under max_steps
        fit_loop.reset_restart_stage()
        epoch_loop.reset_restart_stage()
        return
    saved_after_batch = epoch_loop.restarted_on_train_batch_end
    is_over = epoch.is_over(microstep) and not saved_after_batch  # which Lightning knows by itself
    if is_over or not epoch.is_cut(int(fit_loop.max_batches), num_prompts):
        return
    if saved_after_batch:  # and before this batch was counted as complete
        epoch_loop.batch_progress.increment_completed()
    epoch_loop.batch_progress.reset_on_run()
    epoch_loop.scheduler_progress.reset_on_run()
    epoch_loop.automatic_optimization.optim_progress.reset_on_run()
    epoch_loop.val_loop.batch_progress.total.reset()
    epoch_loop.reset_restart_stage()
