"""Lightning's progress within an epoch, where a run is resumed with epochs of another length."""

from lightning.pytorch.loops.fit_loop import _FitLoop

from gvpo_lightning.rollout.epoch import Epoch


def begin_cut_epoch(fit_loop: _FitLoop, epoch: Epoch, microstep: int, num_prompts: int) -> None:
    """Let an epoch that can't go on begin anew, before its first batch is taken.

    Lightning would go on at the saved number of batches, which is one of the other length. Where it knows by itself
    that the saved epoch is over, as of a checkpoint saved at its end, the next one begins by itself.

    Args:
        fit_loop: the Trainer's, with the progress from the checkpoint.
        epoch, microstep: the run's, from the checkpoint.
        num_prompts: that there are now.
    """
    epoch_loop = fit_loop.epoch_loop
    saved_after_batch = epoch_loop.restarted_on_train_batch_end
    knows = not fit_loop.restarted_mid_epoch or (epoch.is_over(microstep) and not saved_after_batch)
    if knows or not epoch.is_cut(int(fit_loop.max_batches), num_prompts):
        return
    if saved_after_batch:  # and before this batch was counted as complete
        epoch_loop.batch_progress.increment_completed()
    epoch_loop.batch_progress.reset_on_run()
    epoch_loop.scheduler_progress.reset_on_run()
    epoch_loop.automatic_optimization.optim_progress.reset_on_run()
    epoch_loop.val_loop.batch_progress.total.reset()
    epoch_loop.reset_restart_stage()
