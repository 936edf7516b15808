"""What must hold of the Trainer, its strategy and the settings before anything is trained, and what a fit warns of."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from gvpo_kernels.inputs import choose_implementation
from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.guard import Guard
from gvpo_lightning.objectives.base import Objective
from gvpo_lightning.policy.head import Scoring
from gvpo_lightning.policy.head_check import attention_of
from gvpo_lightning.policy.loading import check_attention
from gvpo_lightning.policy.probe import probe_policy
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.reference.base import Reference
from gvpo_lightning.reference.kinds import ModelReference
from gvpo_lightning.rewards.run import Rewards
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


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


def check_fit(data: Any, overfit_batches: float) -> None:
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


def check_own_fit(*, is_own: bool) -> None:
    """Raise ValueError where another module, which holds this one, hands on what Lightning calls."""
    if not is_own:
        raise ValueError(
            "A GVPOModule inside another LightningModule can't be trained or validated through it, since the Trainer "
            "calls the hooks of the outer one only, and completions are sampled in those: subclass GVPOModule, or give "
            "it to trainer.fit itself."
        )


def check_training_batches(data: Any, batches: float, validation: float | None, accumulate: int) -> None:
    """Raise ValueError where an epoch of `batches`, or a validation every so many, would cut an update in two.

    `validation` may be more than an epoch's (check_val_every_n_epoch=None); None where there is none. One that comes by
    the clock may come within an update: RunCheckpoint waits for its end.
    """
    if not isinstance(data, RolloutLoader):
        raise ValueError("The training prompts must come from RolloutLoader(prompts, module).")
    if batches % accumulate:
        raise ValueError(
            f"An epoch must hold whole optimizer updates: limit_train_batches leaves {batches} micro-batches, not "
            f"a multiple of accumulate_grad_batches={accumulate}."
        )
    if batches and isinstance(validation, int) and validation % accumulate:
        raise ValueError(
            f"Validation must not fall within an optimizer update, where a checkpoint would lose gradients: it comes "
            f"every {validation} micro-batches (val_check_interval), not a multiple of "
            f"accumulate_grad_batches={accumulate}."
        )


def check_batch_sizes(
    settings: RolloutSettings, largest_group: int, longest_completion: int, accumulate: int, num_ranks: int
) -> None:
    """Raise ValueError, with the numbers and the mend, where micro-batches can't hold what they must."""
    prompts_per_rollout, prompts_per_update = settings.prompts_per_rollout, settings.prompts_per_update
    size, tokens = settings.micro_batch_size, settings.micro_batch_tokens
    if prompts_per_update > prompts_per_rollout:
        raise ValueError(
            f"An update trains prompts of one rollout: prompts_per_update={prompts_per_update} is more than "
            f"prompts_per_rollout={prompts_per_rollout}. Set prompts_per_rollout={prompts_per_update}, "
            f"or prompts_per_update={prompts_per_rollout}."
        )
    completions = math.ceil(prompts_per_update * largest_group / num_ranks)
    if size is not None and size * accumulate < completions:
        raise ValueError(
            f"An update has up to {completions} completions a rank, more than {accumulate} micro-batches "
            f"(trainer.accumulate_grad_batches) of micro_batch_size={size} hold. Set "
            f"accumulate_grad_batches={math.ceil(completions / size)}, or micro_batch_size="
            f"{math.ceil(completions / accumulate)}."
        )
    if tokens is not None and tokens <= longest_completion:
        raise ValueError(
            f"A micro-batch must hold one completion with its prompt: micro_batch_tokens={tokens} is not more "
            f"than the {longest_completion} tokens that a completion may have. Set micro_batch_tokens="
            f"{2 * longest_completion}, or leave it out."
        )


def check_strategy(placement: Placement, source: PolicySource, *, compiles: bool) -> None:
    """Raise ValueError for a policy, loaded or compiled as the settings say, that the Trainer's strategy can't have."""
    strategy, loading = placement.strategy, source.loading
    if compiles and (placement.is_fsdp1 or placement.ranks.model_group is not None):
        what = "FSDPStrategy" if placement.is_fsdp1 else "tensor parallelism"
        raise ValueError(
            "torch_compile=True works on one device, under DDP and under FSDP2 (ModelParallelStrategy), not with "
            f"{what}: set torch_compile=False."
        )
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


def check_start(
    policy: Any,
    scoring: Scoring,
    placement: Placement,
    reference: Reference,
    rewards: Rewards | None,
    generation: GenerationSettings | None,
) -> None:
    """Probe the policy, and a reference beside it, on a few tokens, where the training runs; wait for the rewards.

    `generation`: how completions are sampled; None: they are not, and whether the policy can is of no concern.
    """
    if rewards is not None:
        rewards.wait_until_loaded()
    # FSDP1's is gathered already, and can't be gathered twice
    gathered = nullcontext() if placement.is_fsdp1 else placement.gathered()
    # gradients are elsewhere where the weights are sharded
    with placement.forward_context(), placement.callable(), torch.set_grad_enabled(not placement.is_sharded):
        error = probe_policy(policy, scoring, gathered=None if generation is None else gathered)
        if isinstance(reference, ModelReference):
            with reference.applied(policy) as model:
                probe_policy(model, scoring)
        name = choose_implementation(scoring.implementation, next(policy.parameters()))
    rank_zero_info(
        f"The loss runs in the '{name}' implementation (loss_implementation={scoring.implementation!r}), "
        f"{error:.1g} from eager."
    )
    if scoring.padding_free and (attention := attention_of(policy)) in ("eager", "sdpa"):
        rank_zero_info(
            f"padding_free=True under '{attention}' attention makes a mask of all pairs of a micro-batch's tokens, "
            "which grows with the square of their number: use flash_attention_2, or keep micro-batches small "
            "(rollout.micro_batch_tokens)."
        )


def warn_of_settings(
    guard: Guard,
    source: PolicySource,
    precision: str,
    objective: Objective,
    temperature: float,
    generation: GenerationSettings | None,
    settings: RolloutSettings,
) -> None:
    """Say what takes the promise of the objective's optimum away; `generation`: how completions are sampled, if any."""
    if source.lora is not None and precision in ("bf16-true", "16-true"):
        guard.say(
            "adapter precision",
            f"trainer.precision={precision} has cast the adapter to 16 bits, in which small steps are "
            "lost: set model.loading.dtype=bfloat16 and trainer.precision=32-true.",
        )
    if settings.zero_variance == "drop":
        rank_zero_info(
            "rollout.zero_variance='drop' changes the objective: groups with equal rewards would pull the policy "
            "towards the reference."
        )
    if generation is None:
        return
    cuts = {"top_k": generation.top_k != 0, "top_p": generation.top_p < 1, "min_p": generation.min_p > 0}
    if objective.needs_sampler_logprobs:
        if any(cuts.values()) or generation.temperature != temperature:
            guard.say(
                "on policy",
                f"objective: {objective.settings.kind} takes completions to be the policy's at model.temperature="
                f"{temperature}, but they are sampled with temperature={generation.temperature}, top_k="
                f"{generation.top_k}, top_p={generation.top_p}, min_p={generation.min_p}: its gradient is biased. Set "
                "the temperatures equal, top_k=0, top_p=1.0 and min_p=0.0.",
            )
        return
    cuts["temperature"] = generation.temperature == 0
    named = " and ".join(f"{name}={getattr(generation, name)}" for name, is_cut in cuts.items() if is_cut)
    if named:
        is_gvpo = str(objective.settings) == "gvpo"
        what_then = "GVPO's optimum is then not unique" if is_gvpo else "that is not trained"
        guard.say(
            "sampler",
            f"Sampling with {named} never draws some of what the reference allows: {what_then}. Set temperature > "
            "0, top_k=0, top_p=1.0 and min_p=0.0 to draw all of it.",
        )
