"""What must hold of the Trainer, its strategy and its settings before anything is trained."""

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.policy import compile
from gvpo_lightning.policy.loading import check_attention
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.plan import Limits
from gvpo_lightning.rollout.settings import RolloutSettings


def check_devices(strategy: Strategy, devices: int) -> None:
    """Raise ValueError where a strategy with given sizes gets another number of devices."""
    if not isinstance(strategy, ModelParallelStrategy):
        return
    sizes = (strategy._data_parallel_size, strategy._tensor_parallel_size)
    if "auto" not in sizes and math.prod(map(int, sizes)) != devices:
        raise ValueError(
            f"data_parallel_size={sizes[0]} times tensor_parallel_size={sizes[1]} of trainer.strategy must be the "
            f"number of devices, {devices}: set trainer.strategy.init_args.data_parallel_size, or trainer.devices and "
            "trainer.num_nodes."
        )


def check_fit(data: Any, overfit_batches: float, callbacks: Iterable[object]) -> None:
    """Raise ValueError for training data and settings of `fit` that rollouts can't be trained with."""
    if isinstance(data, DataLoader):
        raise ValueError(
            "GVPOModule trains micro-batches of rollouts, so its prompts can't come from a bare DataLoader: "
            "write trainer.fit(module, RolloutLoader(dataloader, module))."
        )
    if overfit_batches:
        raise ValueError(
            f"overfit_batches={overfit_batches} repeats batches, but every rollout samples anew: "
            "train on a dataset of a few prompts instead."
        )
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise ValueError(
            "GradientAccumulationScheduler changes how a rollout is cut into updates in the middle of it: "
            "set Trainer(accumulate_grad_batches=…) for the whole run."
        )


def check_training_batches(data: Any, batches: float, validation: float, accumulate: int) -> None:
    """Raise ValueError where an epoch of `batches`, or a validation every so many, would cut an update in two."""
    if not isinstance(data, RolloutLoader):
        raise ValueError("The training prompts must come from RolloutLoader(prompts, module).")
    if batches % accumulate:
        raise ValueError(
            f"An epoch must hold whole optimizer updates: limit_train_batches leaves {batches} micro-batches, not "
            f"a multiple of accumulate_grad_batches={accumulate}."
        )
    if isinstance(validation, int) and validation % accumulate and validation < batches:
        raise ValueError(
            f"Validation must not fall within an optimizer update, where a checkpoint would lose gradients: it comes "
            f"every {validation} micro-batches (val_check_interval), not a multiple of "
            f"accumulate_grad_batches={accumulate}."
        )


def check_rollout_sizes(
    settings: RolloutSettings, largest_group: int, longest_completion: int, accumulate: int, num_ranks: int
) -> None:
    """`check_batch_sizes` of a run's settings."""
    check_batch_sizes(
        group_size=largest_group,
        prompts_per_rollout=settings.prompts_per_rollout,
        prompts_per_update=settings.prompts_per_update,
        limits=settings.limits,
        longest_completion=longest_completion,
        accumulate=accumulate,
        world_size=num_ranks,
    )


def check_batch_sizes(
    *,
    group_size: int,
    prompts_per_rollout: int,
    prompts_per_update: int,
    limits: Limits,
    longest_completion: int,
    accumulate: int,
    world_size: int,
) -> None:
    """Raise ValueError, with the numbers and the mend, where micro-batches can't hold what they must."""
    if prompts_per_update > prompts_per_rollout:
        raise ValueError(
            f"An update trains prompts of one rollout: prompts_per_update={prompts_per_update} is more than "
            f"prompts_per_rollout={prompts_per_rollout}. Set prompts_per_rollout={prompts_per_update}, "
            f"or prompts_per_update={prompts_per_rollout}."
        )
    completions = math.ceil(prompts_per_update * group_size / world_size)
    if limits.completions is not None and limits.completions * accumulate < completions:
        raise ValueError(
            f"An update has up to {completions} completions a rank, more than {accumulate} micro-batches "
            f"(trainer.accumulate_grad_batches) of micro_batch_size={limits.completions} hold. Set "
            f"accumulate_grad_batches={math.ceil(completions / limits.completions)}, or micro_batch_size="
            f"{math.ceil(completions / accumulate)}."
        )
    if limits.tokens is not None and limits.tokens <= longest_completion:
        raise ValueError(
            f"A micro-batch must hold one completion with its prompt: micro_batch_tokens={limits.tokens} is not more "
            f"than the {longest_completion} tokens that a completion may have. Set micro_batch_tokens="
            f"{2 * longest_completion}, or leave it out."
        )


def check_strategy(placement: Placement, source: PolicySource, *, compiles: bool) -> None:
    """Raise ValueError for a policy, loaded or compiled as the settings say, that the Trainer's strategy can't have."""
    strategy, loading = placement.strategy, source.loading
    if compiles:
        compile.check_strategy(strategy)
    check_attention(loading, placement.device, placement.precision)
    if loading.quantization is not None and placement.is_sharded:
        raise ValueError(
            f"loading.quantization={loading.quantization!r} can't be sharded, got {type(strategy).__name__}: "
            "use one device or DDP, or loading.dtype=bfloat16 without quantization."
        )
    if source.lora is not None and loading.dtype != "float32" and placement.is_fsdp1:
        raise ValueError(
            f"FSDPStrategy can't hold a float32 adapter beside weights in loading.dtype={loading.dtype}: use "
            "FSDP2 (ModelParallelStrategy, configs/strategy/fsdp2.yaml), or leave loading.dtype out."
        )
