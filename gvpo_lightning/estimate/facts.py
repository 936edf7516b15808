"""The facts that an estimate needs: a causal LM's sizes, counted on a model without storage, and those of the run."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers import PretrainedConfig

from gvpo_lightning.policy.loading import LoadingSettings, empty_model
from gvpo_lightning.reference.settings import ReferenceKind


@dataclass(frozen=True)
class ModelSizes:
    """What of a dense decoder decides its memory and its work.

    Attributes:
        parameters: of the whole model, tied ones once.
        num_layers, layer: decoder layers, and the parameters of one.
        embedding, head: parameters of the input embedding and of the head's weight; the same ones where `tied`.
        hidden, intermediate: features of the residual stream and of the MLP.
        num_heads, num_kv_heads, head_dim: of the attention.
        gated: whether the MLP has a gate, and so three matrices.
    """

    parameters: int
    num_layers: int
    layer: int
    embedding: int
    head: int
    tied: bool
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gated: bool

    @property
    def layers(self) -> int:
        """Parameters of all decoder layers."""
        return self.num_layers * self.layer

    @property
    def root(self) -> int:
        """Parameters outside the decoder layers: embedding, last norm and head, FSDP's root unit."""
        return self.parameters - self.layers


def model_sizes(config: PretrainedConfig, loading: LoadingSettings = LoadingSettings()) -> ModelSizes:
    """The sizes of the causal LM that this config describes, whatever its architecture; nothing is allocated.

    Raises:
        ValueError: the model has no list of decoder layers.
    """
    model: Any = empty_model(config, loading)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder layers: its memory can't be estimated.")
    layers = list(max(lists, key=count_parameters))
    text: Any = config.get_text_config()
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    intermediate = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    num_heads = text.num_attention_heads
    return ModelSizes(
        parameters=count_parameters(model),
        num_layers=len(layers),
        layer=max(map(count_parameters, layers)),
        embedding=embedding.numel(),
        head=head.numel(),
        tied=head is embedding,
        hidden=text.hidden_size,
        intermediate=intermediate,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        vocab_size=head.shape[0],
        gated=_mlp_matrices(layers[0], text.hidden_size, intermediate) >= 3,
    )


def with_adapters(sizes: ModelSizes, adapters: int) -> ModelSizes:
    """The sizes with so many parameters more, spread over the decoder layers."""
    layer = sizes.layer + adapters // sizes.num_layers
    return replace(sizes, layer=layer, parameters=sizes.parameters + adapters)


def count_parameters(module: Any, *, trained: bool = False) -> int:
    """Elements of a module's parameters, or of those that are trained; of a DTensor, all shards'."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def quantized_layer_bytes(model: Any, sizes: ModelSizes) -> float:
    """Of one frozen parameter of a quantized model's decoder layers, the constants of the quantization included."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {v.data_ptr(): v.nbytes for k, v in model.state_dict().items() if k not in trained and v.numel()}
    root = next(p for p in model.parameters() if p.is_floating_point()).element_size() * sizes.root
    return (sum(frozen.values()) - root) / sizes.layers


def _mlp_matrices(layer: nn.Module, hidden: int, intermediate: int) -> float:
    """Matrices between the residual stream and the MLP's features; a fused gate counts as two."""
    shapes = [p.shape for p in layer.parameters() if p.ndim == 2]
    return sum(a * b / (hidden * intermediate) for a, b in shapes if not max(a, b) % intermediate)


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
