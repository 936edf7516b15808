"""Lightning's progress within an epoch, where a run is resumed with epochs of another length."""

from lightning.pytorch.loops.fit_loop import _FitLoop


def begin_whole_epoch(fit_loop: _FitLoop, *, is_over: bool) -> None:
    """Let an epoch that is resumed begin anew, before its first batch is taken.

    Lightning would go on at the saved number of batches, which is one of the other length.

    Args:
        fit_loop: the Trainer's, with the progress from the checkpoint.
        is_over: the checkpoint was saved after all batches of an epoch. Where Lightning knows that too, as of one
            saved at the epoch's end, the next epoch begins by itself.
    """
    epoch_loop = fit_loop.epoch_loop
    saved_after_batch = epoch_loop.restarted_on_train_batch_end
    if not fit_loop.restarted_mid_epoch or (is_over and not saved_after_batch):
        return
    if saved_after_batch:  # and before this batch was counted as complete
        epoch_loop.batch_progress.increment_completed()
    epoch_loop.batch_progress.reset_on_run()
    epoch_loop.scheduler_progress.reset_on_run()
    epoch_loop.automatic_optimization.optim_progress.reset_on_run()
    epoch_loop.val_loop.batch_progress.total.reset()
    epoch_loop.reset_restart_stage()
