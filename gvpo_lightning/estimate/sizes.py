"""A causal LM's sizes, counted on a model without storage."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from gvpo_lightning.policy.loading import LoadingSettings, empty_model


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
