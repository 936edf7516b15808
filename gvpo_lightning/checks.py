"""What must hold of prompts and of the Trainer's settings before anything is trained."""

import math
from collections.abc import Iterable, Mapping

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gvpo_lightning.plan import check_batch_sizes
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.running import Rewards
from gvpo_lightning.rollout.generation import GenerationSettings, encode_prompt
from gvpo_lightning.rollout.loader import RolloutLoader, Row
from gvpo_lightning.rollout.sampling import RolloutSettings
from gvpo_lightning.sharding import data_ranks


def check_prompts(
    rows: Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    rewards: Rewards | None,
    max_new_tokens: int,
) -> int:
    """Raise ValueError, naming the row, for prompts that a policy with this config can't be given.

    That is: no `prompt`, a prompt that is neither text nor messages, no room for max_new_tokens in the
    model's context, or rows without the columns that the rewards need.

    Returns:
        the longest prompt's tokens.
    """
    longest = 0
    context = context_length(config)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of the prompts must be a dict with a 'prompt', got {type(row).__name__}.")
        if "prompt" not in row:
            raise ValueError(f"Row {number} has no 'prompt': its columns are {sorted(row)}.")
        if number == 0:
            columns = set(row)
            if rewards is not None:
                rewards.check_columns(set(reward_columns(row)))
        if set(row) != columns:
            raise ValueError(f"Row {number} has the columns {sorted(row)}, but row 0 has {sorted(columns)}.")
        try:
            length = len(encode_prompt(row["prompt"], tokenizer))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        if context is not None and length + max_new_tokens > context:
            raise ValueError(
                f"Row {number}: the prompt's {length} tokens and generation.max_new_tokens={max_new_tokens} exceed the "
                f"model's context of {context}: shorten the prompt or max_new_tokens, or leave the row out."
            )
        longest = max(longest, length)
    return longest


def check_devices(trainer: Trainer) -> None:
    """Raise ValueError where a strategy with given sizes gets another number of devices."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    sizes, devices = (strategy._data_parallel_size, strategy._tensor_parallel_size), trainer.world_size
    if "auto" not in sizes and math.prod(map(int, sizes)) != devices:
        raise ValueError(
            f"data_parallel_size={sizes[0]} times tensor_parallel_size={sizes[1]} of trainer.strategy must be the "
            f"number of devices, {devices}: set trainer.strategy.init_args.data_parallel_size, or trainer.devices and "
            "trainer.num_nodes."
        )


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes; None where its config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_trainer(
    trainer: Trainer,
    settings: RolloutSettings,
    generation: GenerationSettings,
    *,
    generates: bool,
    largest_group: int,
) -> None:
    """Raise ValueError for what `fit` was given that rollouts can't be trained with."""
    # the earliest place that shows what `fit` was given; a property that says so comes only much later
    if isinstance(trainer.fit_loop._data_source.instance, DataLoader):
        raise ValueError(
            "GVPOModule trains micro-batches of rollouts, so its prompts can't come from a bare DataLoader: "
            "write trainer.fit(module, RolloutLoader(dataloader, module))."
        )
    overfit_batches: float = trainer.overfit_batches  # type: ignore[attr-defined]
    if overfit_batches:
        raise ValueError(
            f"overfit_batches={overfit_batches} repeats batches, but every rollout samples anew: "
            "train on a dataset of a few prompts instead."
        )
    callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise ValueError(
            "GradientAccumulationScheduler changes how a rollout is cut into updates in the middle of it: "
            "set Trainer(accumulate_grad_batches=…) for the whole run."
        )
    check_batch_sizes(
        group_size=largest_group,
        prompts_per_rollout=settings.prompts_per_rollout,
        prompts_per_update=settings.prompts_per_update,
        limits=settings.limits,
        longest_completion=generation.max_new_tokens if generates else 0,
        accumulate=trainer.accumulate_grad_batches,
        world_size=data_ranks(trainer.strategy).size,
    )


def check_training_batches(trainer: Trainer) -> None:
    """Raise ValueError where an epoch or a validation would cut an optimizer update in two."""
    if not isinstance(trainer.train_dataloader, RolloutLoader):
        raise ValueError("The training prompts must come from RolloutLoader(prompts, module).")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    accumulate = trainer.accumulate_grad_batches
    batches, validation = trainer.num_training_batches, trainer.val_check_batch
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
