"""The facts of a run that an estimate needs, beside the model's sizes."""

import math
from dataclasses import dataclass
from typing import Literal

from gvpo_lightning.reference.settings import ReferenceKind


@dataclass(frozen=True)
class Workload:
    """What is sampled and trained, as in `RolloutSettings` and `GenerationSettings`; counts are over all ranks.

    Attributes:
        prompt_tokens, completion_tokens: of every completion; where lengths differ, the longest.
        group_size, prompts_per_rollout, prompts_per_update, epochs_per_rollout: as in `RolloutSettings`.
        accumulate: micro-batches an update, on every rank.
        generation_batch: completions that one rank samples at once.
        generates: False where all completions are recorded ones.
    """

    prompt_tokens: int
    completion_tokens: int
    group_size: int = 8
    prompts_per_rollout: int = 32
    prompts_per_update: int = 8
    epochs_per_rollout: int = 1
    accumulate: int = 1
    generation_batch: int = 256
    generates: bool = True

    @property
    def tokens(self) -> int:
        """Of a prompt with its completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates from one rollout to the next."""
        return math.ceil(self.prompts_per_rollout / self.prompts_per_update) * self.epochs_per_rollout


@dataclass(frozen=True)
class RunFacts:
    """How a run is spread over GPUs, and in which precision.

    Attributes:
        workload: what is sampled and trained.
        num_gpus, gpus_per_node: one process a GPU.
        strategy: "ddp" (also for one GPU), "fsdp1" or "fsdp2" with one unit a decoder layer and the root.
        tensor_parallel: GPUs that share a decoder layer; embedding and head are whole on each (but sharded by FSDP).
        weight_bytes: of a parameter as it is held; of trained ones, gradients and copies for the reference are like it.
        compute_bytes: of a parameter in matmuls. Less than weight_bytes: autocast under DDP, gathered so by FSDP2.
        reduce_bytes: of a gradient on its way between GPUs.
        optimizer_bytes: state of one trained parameter: AdamW 8, SGD 0 or with momentum 4.
        trained_parameters: with LoRA the adapters'; None for all of the model.
        trained_bytes: of an adapter's parameter, float32 whatever the model's dtype; None = weight_bytes.
        layer_bytes: of a quantized parameter of a decoder layer, with its share of constants; None = weight_bytes.
        reference: its kind; `reference_parameters` of a model of its own, 0 for values that take the policy's place.
        checkpointing: decoder layers are computed again in the backward pass.
        padding_free: a micro-batch is one row, so that a mask covers all pairs of its tokens.
        masks: attention is given a mask ("eager" and "sdpa").
        couples_groups: the objective's gradient of a completion depends on its group's others; grpo's and sft's do not.
        scores_sampler: completions are scored under the policy that has sampled them, as ratios to it need.
        reward_bytes: of reward models' weights, which stay beside the policy.
        cuda: on GPUs; the loss then runs in Triton, and AdamW works on all tensors at once.
    """

    workload: Workload
    num_gpus: int = 1
    gpus_per_node: int = 8
    strategy: Literal["ddp", "fsdp1", "fsdp2"] = "ddp"
    tensor_parallel: int = 1
    weight_bytes: int = 4
    compute_bytes: int = 2
    reduce_bytes: int = 4
    optimizer_bytes: int = 8
    trained_parameters: int | None = None
    trained_bytes: int | None = None
    layer_bytes: float | None = None
    reference: ReferenceKind = "frozen"
    reference_parameters: int = 0
    checkpointing: bool = True
    padding_free: bool = False
    masks: bool = True
    couples_groups: bool = True
    scores_sampler: bool = False
    reward_bytes: int = 0
    cuda: bool = True

    def __post_init__(self) -> None:
        if self.num_gpus % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel must divide num_gpus, got {self.tensor_parallel} and {self.num_gpus}: "
                "every group of GPUs holds one model."
            )

    @property
    def data_parallel(self) -> int:
        """Ranks with completions of their own."""
        return self.num_gpus // self.tensor_parallel

    @property
    def sharded(self) -> bool:
        """Whether data-parallel ranks share one set of parameters, gradients and optimizer state."""
        return self.strategy != "ddp"

    @property
    def shards(self) -> int:
        """Parts that one set is cut into, beside tensor parallelism."""
        return self.data_parallel if self.sharded else 1

    @property
    def autocast(self) -> bool:
        """Whether matmuls cast weights that are held in another precision."""
        return not self.sharded and self.compute_bytes < self.weight_bytes

    @property
    def bytes_trained(self) -> int:
        """Of a trained parameter."""
        return self.weight_bytes if self.trained_bytes is None else self.trained_bytes

    @property
    def casts_to_adapters(self) -> bool:
        """Whether each adapter makes a copy of its input, in its own wider precision."""
        return self.trained_parameters is not None and self.bytes_trained > self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Of an element of the residual stream: autocast leaves it in the embedding's precision."""
        return self.weight_bytes if self.autocast else self.compute_bytes

    @property
    def nodes(self) -> int:
        """Machines."""
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def rollout_completions(self) -> int:
        """Completions of one rollout on one rank."""
        return math.ceil(self.workload.prompts_per_rollout / self.data_parallel) * self.workload.group_size

    @property
    def micro_batch(self) -> int:
        """Completions of one micro-batch on one rank."""
        work = self.workload
        update = math.ceil(min(work.prompts_per_update, work.prompts_per_rollout) / self.data_parallel)
        return math.ceil(update * work.group_size / work.accumulate)

    @property
    def mask_pairs(self) -> int:
        """Pairs of tokens that a micro-batch's attention mask covers."""
        if not self.masks:
            return 0
        tokens = self.workload.tokens
        return (self.micro_batch * tokens) ** 2 if self.padding_free else self.micro_batch * tokens**2

    @property
    def two_passes(self) -> bool:
        """Whether groups are cut over micro-batches, so that a pass without gradient comes first."""
        return self.couples_groups and self.micro_batch < self.workload.group_size and self.workload.accumulate > 1

    @property
    def scores(self) -> bool:
        """Whether completions are scored under a reference in the run."""
        return self.reference != "cached"

    @property
    def num_scorings(self) -> int:
        """Passes over a rollout's completions without gradient, under the reference and the policy that has sampled."""
        return self.scores + self.scores_sampler
