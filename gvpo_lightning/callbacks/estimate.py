"""What a run's memory will be, said before it is trained."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import lightning as L
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from gvpo_lightning.estimate import ModelSizes, RunFacts, Workload, describe, estimate_memory, model_sizes
from gvpo_lightning.estimate.sizes import count_parameters, quantized_layer_bytes, with_adapters
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head_check import attention_of
from gvpo_lightning.policy.loading import is_quantized
from gvpo_lightning.reference.adapter_off import AdapterOffReference


class MemoryEstimate(L.Callback):
    """Prints the estimated memory of each phase on one GPU when training starts."""

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print it; a policy of an unknown kind is no reason not to train it."""
        assert isinstance(pl_module, GVPOModule)
        try:
            sizes, facts = run_facts(trainer, pl_module)
        except (ValueError, AttributeError) as error:
            print(f"No estimate of memory: {error}")
            return
        print(describe(estimate_memory(sizes, facts), facts))


def run_facts(trainer: L.Trainer, module: GVPOModule) -> tuple[ModelSizes, RunFacts]:
    """The policy's sizes, its adapters among them, and the facts of the run that is about to start."""
    policy: Any = module.policy
    sizes = model_sizes(module.model_config(), module.loading)
    layer_bytes = quantized_layer_bytes(policy, sizes) if is_quantized(policy) else None
    shards = trainer.world_size if isinstance(trainer.strategy, FSDPStrategy) else 1  # of which a rank sees its own
    total, trained = (count_parameters(policy, trained=only) * shards for only in (False, True))
    if trained != total:
        sizes = with_adapters(sizes, trained)
    parameter = next(policy.parameters())
    weight_bytes, without_adapter = parameter.element_size(), isinstance(module.reference, AdapterOffReference)
    trained_bytes = next(p for p in policy.parameters() if p.requires_grad).element_size()
    strategy, tensor_parallel = _strategy(trainer)
    mixed = "mixed" in str(trainer.precision)
    reference = getattr(module.reference, "model", None)
    models: list[Any] = [] if module.rewards is None else list(module.rewards.functions.values())
    facts = RunFacts(
        workload=_workload(trainer, module),
        num_gpus=trainer.world_size,
        gpus_per_node=max(1, trainer.world_size // trainer.num_nodes),
        strategy=strategy,
        tensor_parallel=tensor_parallel,
        weight_bytes=weight_bytes,
        compute_bytes=min(2, weight_bytes) if mixed else weight_bytes,
        reduce_bytes=trained_bytes,
        optimizer_bytes=trained_bytes * _states(trainer),
        trained_parameters=None if trained == total else trained,
        trained_bytes=trained_bytes,
        layer_bytes=layer_bytes,
        reference="adapter_off" if without_adapter else module.reference_settings.kind,
        checkpointing=any(getattr(part, "gradient_checkpointing", False) for part in policy.modules()),
        padding_free=module.padding_free,
        masks=attention_of(policy) in ("eager", "sdpa"),
        couples_groups=module.objective.couples_groups,
        scores_sampler=module.objective.needs_sampler_logprobs,
        reward_bytes=sum(reward.weight_bytes() for reward in models if callable(getattr(reward, "weight_bytes", None))),
        cuda=parameter.is_cuda,
    )
    return sizes, facts if reference is None else replace(facts, reference_parameters=count_parameters(reference))


def _strategy(trainer: L.Trainer) -> tuple[Literal["ddp", "fsdp1", "fsdp2"], int]:
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        return "fsdp2", strategy.device_mesh["tensor_parallel"].size()
    return ("fsdp1" if isinstance(strategy, FSDPStrategy) else "ddp"), 1


def _states(trainer: L.Trainer) -> int:
    """Tensors that the optimizer keeps of each parameter, as its settings tell before the first step."""
    defaults: Mapping[str, Any] = trainer.optimizers[0].defaults
    if "betas" in defaults:
        return 3 if defaults.get("amsgrad") else 2
    return 1 if defaults.get("momentum") or "alpha" in defaults else 0


def _workload(trainer: L.Trainer, module: GVPOModule) -> Workload:
    settings, generation = module.rollout_settings, module.generation
    return Workload(
        prompt_tokens=module.longest_prompt,
        completion_tokens=settings.max_completion_tokens or generation.max_new_tokens,
        group_size=settings.group_size,
        prompts_per_rollout=settings.prompts_per_rollout,
        prompts_per_update=settings.prompts_per_update,
        epochs_per_rollout=settings.epochs_per_rollout,
        accumulate=trainer.accumulate_grad_batches,
        generation_batch=generation.batch_size,
        generates=module.sources.settings.generates,
    )
