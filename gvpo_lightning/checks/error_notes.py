"""`Whereabouts`: errors within training say where in the run they came, and which of them another rank caused."""

import re
from typing import Any

import lightning as L
import torch.distributed as dist

# what gloo, NCCL and torch's store say of a peer that does not answer
OTHER_RANK = re.compile(
    r"timed? ?out|connection (closed|reset|refused)|broken pipe|socket|watchdog|remote process exited", re.IGNORECASE
)


class Whereabouts(L.Callback):
    """Adds notes to an exception that ends `fit`; `GVPOModule` brings this callback along.

    Once training has begun, the first names rank, rollout, update, micro-batch and phase. One more follows where the
    exception is of a collective operation in which another rank did not take part: how long was waited, and what to
    look at.
    """

    def __init__(self) -> None:
        self._has_begun = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From now on there is a place to name; what came before are mistakes in the settings."""
        self._has_begun = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What comes after is not within training any more."""
        self._has_begun = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Add the notes."""
        if isinstance(exception, SystemExit):
            return
        place = f"on rank {trainer.global_rank}, outside of training"
        if self._has_begun:
            module: Any = pl_module  # a GVPOModule
            accumulate = trainer.accumulate_grad_batches
            rollout, slot = divmod(module.microstep, module.micro_batches_per_rollout)
            phase = module.phase if trainer.training else str(trainer.state.stage and trainer.state.stage.value)
            place = (
                f"on rank {trainer.global_rank} of {trainer.world_size}, in rollout {rollout}, update "
                f"{trainer.global_step}, micro-batch {slot % accumulate} of {accumulate} (phase: {phase})"
            )
            exception.add_note(f"This was {place}.")
        if is_other_ranks(exception):
            timeout = getattr(trainer.strategy, "_timeout", None)
            waited = "" if timeout is None else f", which waits {timeout.total_seconds():.0f} s at most"
            exception.add_note(
                f"Another rank is late or dead: {place}, a collective operation went without it{waited}. Look for the "
                "first error in the other ranks' output. Where rewards or rollouts take so long, raise the "
                "strategy's timeout, as in DDPStrategy(timeout=timedelta(hours=1))."
            )
        self._has_begun = False


def is_other_ranks(exception: BaseException) -> bool:
    """Whether this is a collective operation that another rank did not take part in."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    own = isinstance(exception, dist.DistError) or type(exception) is RuntimeError
    return own and OTHER_RANK.search(str(exception)) is not None
