"""Tensor parallelism: each layer split over the ranks of a group, by the plan that transformers has for it."""

import fnmatch
import inspect
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

HEADS_DIMENSION = 2  # of (batch, tokens, heads, head size), where transformers normalises queries and keys


def base_model(policy: Any) -> Any:
    """The transformers model, beneath peft's wrapper if there is one."""
    return policy.get_base_model() if hasattr(policy, "get_base_model") else policy


def split_tensors(policy: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism by the plan that transformers has for the model's layers; embeddings and head stay whole.

    Of a layer with LoRA, the factor on the split side is split with it.
    """
    model = base_model(policy)
    config, plan = model.config.get_text_config(), model.config.get_text_config().base_model_tp_plan
    if not plan:
        raise ValueError(
            f"transformers has no tensor-parallel plan for {type(model).__name__}: set tensor_parallel_size=1."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % mesh.size():
            raise ValueError(
                f"tensor_parallel_size={mesh.size()} must divide the model's {name}={getattr(config, name)}."
            )
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.base_model.named_modules():
        kind = next((kind for pattern, kind in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if kind is None or isinstance(module, nn.Embedding):
            continue
        if kind not in ("colwise", "rowwise", "replicated_with_grad_allreduce"):
            raise ValueError(
                f"Tensor parallelism of {type(model).__name__} needs '{kind}' for {name}, which is not supported: "
                "set tensor_parallel_size=1."
            )
        if kind == "replicated_with_grad_allreduce":  # a norm of each head, of which every rank has some
            styles[name] = SequenceParallel(sequence_dim=HEADS_DIMENSION, use_local_output=True)
            continue
        style, factor = (ColwiseParallel(), "lora_B") if kind == "colwise" else (RowwiseParallel(), "lora_A")
        if not hasattr(module, "base_layer"):
            styles[name] = style
            continue
        styles[f"{name}.base_layer"] = style
        for adapter in getattr(module, factor):
            styles[f"{name}.{factor}.{adapter}"] = type(style)()
    _check_split(model, styles)
    # every rank has the whole model: nothing has to be sent
    parallelize_module(model.base_model, mesh, styles | _shared_inputs(model.base_model, styles), src_data_rank=None)


def _check_split(model: Any, styles: dict[str, ParallelStyle]) -> None:
    """Raise ValueError where the plan splits nothing of this model, or what parameters of another kind act on."""
    mend = f"Tensor parallelism of {type(model).__name__} is not supported: set tensor_parallel_size=1."
    if not styles:
        raise ValueError(f"transformers' plan fits none of the model's layers. {mend}")
    parents = tuple({f"{name.rpartition('.')[0]}." for name, style in styles.items() if "lora_" not in name})
    for name, module in model.base_model.named_modules():
        known = isinstance(module, nn.Linear) or "Norm" in type(module).__name__ or name in styles
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and not known and f"{name}.".startswith(parents) and "lora_" not in name:
            raise ValueError(f"{name}.{own[0]} acts on what is split, but is whole on every rank. {mend}")


def _shared_inputs(model: nn.Module, styles: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    """For layers that read one tensor together (q, k and v; gate and up), one all-reduce of its gradient for all."""
    readers: dict[str, list[nn.Module]] = {}
    for name, style in styles.items():
        if isinstance(style, ColwiseParallel):
            readers.setdefault(name.rpartition(".")[0], []).append(model.get_submodule(name))
    shared: dict[str, ParallelStyle] = {}
    for name, modules in readers.items():
        parent = model.get_submodule(name)
        if len(modules) < 2 or any(hasattr(part, "base_layer") for part in parent.children()):
            continue  # of LoRA, one factor is whole, and can't take what is prepared for split ones
        first, *others = inspect.signature(parent.forward).parameters
        layouts: dict[str, Any] = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
        if others:  # attention, which transformers calls by keyword
            layouts = {key: {first: Replicate()} for key in ("input_kwarg_layouts", "desired_input_kwarg_layouts")}
        shared[name] = PrepareModuleInput(**layouts, use_local_output=False)
    return shared
