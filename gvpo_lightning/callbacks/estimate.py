"""What a run's memory will be, said before it is trained."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only

from gvpo_lightning.distributed.placement import Placement
from gvpo_lightning.estimate import ModelSizes, RunFacts, Workload, describe, estimate_memory, model_sizes
from gvpo_lightning.estimate.facts import count_parameters, quantized_layer_bytes, with_adapters
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head_check import attention_of
from gvpo_lightning.policy.loading import is_quantized
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.reference.kinds import AdapterOffReference


class MemoryEstimate(L.Callback):
    """Prints the estimated memory of each phase on one GPU when training starts.

    Attributes:
        sizes, facts: what it was estimated from; None before, and of a policy of an unknown kind.
    """

    def __init__(self) -> None:
        self.sizes: ModelSizes | None = None
        self.facts: RunFacts | None = None

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print it; a policy of an unknown kind is no reason not to train it."""
        assert isinstance(pl_module, GVPOModule)
        module, generation, settings = pl_module, pl_module.generation, pl_module.rollout_settings
        workload = Workload(
            prompt_tokens=module.prompts.longest,
            completion_tokens=settings.max_completion_tokens or generation.max_new_tokens,
            group_size=settings.group_size,
            prompts_per_rollout=settings.prompts_per_rollout,
            prompts_per_update=settings.prompts_per_update,
            epochs_per_rollout=settings.epochs_per_rollout,
            accumulate=trainer.accumulate_grad_batches,
            generation_batch=generation.batch_size,
            generates=module.sources.settings.generates,
        )
        without_adapter = isinstance(module.reference, AdapterOffReference)
        other = getattr(module.reference, "model", None)
        rewards: list[Any] = [] if module.rewards is None else list(module.rewards.functions.values())
        try:
            self.sizes, weights = weight_facts(module.policy, module.source, module.placement)
        except (ValueError, AttributeError) as error:
            print(f"No estimate of memory: {error}")
            return
        self.facts = RunFacts(
            workload=workload,
            num_gpus=trainer.world_size,
            gpus_per_node=max(1, trainer.world_size // trainer.num_nodes),
            optimizer_bytes=weights["trained_bytes"] * num_states(trainer.optimizers[0].defaults),
            reference="adapter_off" if without_adapter else module.reference_settings.kind,
            reference_parameters=0 if other is None else count_parameters(other),
            padding_free=module.scoring.padding_free,
            couples_groups=module.objective.couples_groups,
            scores_sampler=module.objective.needs_sampler_logprobs,
            reward_bytes=sum(part.weight_bytes() for part in rewards if callable(getattr(part, "weight_bytes", None))),
            **weights,
        )
        print(describe(estimate_memory(self.sizes, self.facts), self.facts))


def weight_facts(policy: Any, source: PolicySource, placement: Placement) -> tuple[ModelSizes, dict[str, Any]]:
    """The policy's sizes, its adapters among them, and the facts of how it is held."""
    sizes = model_sizes(source.config(), source.loading)
    layer_bytes = quantized_layer_bytes(policy, sizes) if is_quantized(policy) else None
    shards = placement.num_ranks if placement.is_fsdp1 else 1  # of which a rank sees its own
    total, trained = (count_parameters(policy, trained=only) * shards for only in (False, True))
    if trained != total:
        sizes = with_adapters(sizes, trained)
    parameter = next(policy.parameters())
    weight_bytes = parameter.element_size()
    trained_bytes = next(p for p in policy.parameters() if p.requires_grad).element_size()
    strategy, tensor_parallel = "fsdp1" if placement.is_fsdp1 else "ddp", 1
    if isinstance(placement.strategy, ModelParallelStrategy):
        strategy, tensor_parallel = "fsdp2", placement.strategy.device_mesh["tensor_parallel"].size()
    return sizes, {
        "strategy": strategy,
        "tensor_parallel": tensor_parallel,
        "weight_bytes": weight_bytes,
        "compute_bytes": min(2, weight_bytes) if "mixed" in placement.precision else weight_bytes,
        "reduce_bytes": trained_bytes,
        "trained_parameters": None if trained == total else trained,
        "trained_bytes": trained_bytes,
        "layer_bytes": layer_bytes,
        "checkpointing": any(getattr(part, "gradient_checkpointing", False) for part in policy.modules()),
        "masks": attention_of(policy) in ("eager", "sdpa"),
        "cuda": parameter.is_cuda,
    }


def num_states(defaults: Mapping[str, Any]) -> int:
    """Tensors that an optimizer keeps of each parameter, as its settings tell before the first step."""
    if "betas" in defaults:
        return 3 if defaults.get("amsgrad") else 2
    return 1 if defaults.get("momentum") or "alpha" in defaults else 0
