"""What happens in a run, seen from its hooks."""


def on_rollout(module, before=None, after=None):
    """Call `before(index)` when a rollout is about to be collected, and `after(rollout)` when it has been."""
    original = module.on_train_batch_start

    def on_train_batch_start(batch, batch_idx):
        is_first = batch["slot"] == 0
        if is_first and before is not None:
            before(batch["rollout"])
        original(batch, batch_idx)
        if is_first and after is not None:
            after(module.rollout)

    module.on_train_batch_start = on_train_batch_start


def rollouts_of(module):
    """A list that every rollout is added to when it has been collected."""
    rollouts = []
    on_rollout(module, after=rollouts.append)
    return rollouts


def on_update(module, before):
    """Call `before(update, rollout)` when an optimizer update is about to be trained."""
    original = module.training_step

    def training_step(batch, batch_idx):
        index, slot = divmod(batch["slot"], module.trainer.accumulate_grad_batches)
        if slot == 0:
            before(module.updates[index], module.rollout)
        return original(batch, batch_idx)

    module.training_step = training_step
