"""Lightning's callbacks that a policy can't be trained with."""

from collections.abc import Iterable

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import Strategy

from gvpo_lightning.distributed.sharding import is_sharded


def check_callbacks(callbacks: Iterable[object], strategy: Strategy, *, is_loaded: bool) -> None:
    """Raise ValueError for those that change what rollouts are made of, and for those whose copies of weights fail.

    Args:
        callbacks, strategy: the Trainer's.
        is_loaded: the policy is in memory already, before the callbacks' `setup`.
    """
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, GradientAccumulationScheduler):
            raise ValueError(
                "GradientAccumulationScheduler changes how a rollout is cut into updates in the middle of it: "
                "set Trainer(accumulate_grad_batches=…) for the whole run."
            )
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                "LearningRateFinder (Tuner.lr_find) looks for the learning rate at which the loss falls fastest, but "
                "GVPO's loss is no measure of progress where every rollout samples anew: try learning rates in short "
                "runs, and compare their rewards."
            )
        if isinstance(callback, BatchSizeFinder):
            raise ValueError(
                "BatchSizeFinder (Tuner.scale_batch_size) changes the batch size of prompts, but what fills the memory "
                "are micro-batches: set rollout.micro_batch_size or micro_batch_tokens, and generation.batch_size."
            )
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{name} unfreezes weights in the middle of a run, of which the reference has kept no copy: leave it "
                "out, and freeze what is not to be trained in the model that you give to GVPOModule."
            )
        if isinstance(callback, ModelPruning):
            raise ValueError(
                f"{name} renames the weights that reference, checkpoints and export go by: leave it out, and prune the "
                "model before you give it to GVPOModule, or the exported one."
            )
        if isinstance(callback, (StochasticWeightAveraging, WeightAveraging)) and is_sharded(strategy):
            raise ValueError(
                f"{name} can't average weights of which ranks hold parts (FSDP, tensor parallelism): leave it out, or "
                "train on one device or with DDP."
            )
        if isinstance(callback, StochasticWeightAveraging) and not is_loaded:
            raise ValueError(
                f"{name} copies the policy before one given by name is loaded, and would average nothing: give "
                "GVPOModule the model itself, AutoModelForCausalLM.from_pretrained(…), with tokenizer=…, or use "
                "EMAWeightAveraging."
            )
