"""`gvpo export`: a checkpoint of any strategy becomes a Hugging Face folder, one shard of it in memory at a time.

Parameter names, shapes and ties come from the policy's config, built without storage; no GPU, process group or data is
needed.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from gvpo_lightning.atomic import appearing
from gvpo_lightning.checkpointing.adapter import adapter_state, check_adapter_state
from gvpo_lightning.checkpointing.weights import SavedWeights, as_written, match_names, open_weights
from gvpo_lightning.export.folder import (
    adapted_model,
    merge,
    save_model,
    say_dequantized,
    trained_sources,
    write_adapter,
    write_beside,
)
from gvpo_lightning.export.model_card import Kind, Origin, files_of_run
from gvpo_lightning.policy.loading import adapter_base, empty_model, load_generation_config
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.policy.weights import frozen_fingerprint

Tensors = dict[str, Tensor]


def export_checkpoint(
    source: PolicySource,
    settings: Mapping[str, Any],
    ckpt_path: str | Path,
    output: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
    merge_adapter: bool = False,
) -> Path:
    """Write the checkpoint's policy, with tokenizer, generation config and model card, as transformers loads it.

    A policy with an adapter is written as peft loads it, the adapter alone; or merged, which takes memory for it all.

    Args:
        source: names policy, adapter and tokenizer; the policy's weights are neither loaded nor used.
        settings: what the policy was trained with, for the model card.
        ckpt_path: a file, or the folder of a distributed checkpoint of any number of ranks.
        output: a folder that does not exist or is empty; it appears when it is complete.
        max_shard_size: of one safetensors file, in bytes or such as "5GB"; also what is in memory at a time. A larger
            tensor gets a file of its own.
        dtype: of the written floating-point tensors; default: the checkpoint's, or of a merged model the policy's.
        merge_adapter: add the adapter to the policy's weights, and write those.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, it does not fit the policy's config or is not
            whole, there is no adapter to merge, or `output` is in use.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and is not an empty folder: remove it, or give another one.")
    weights = open_weights(ckpt_path)
    adapted = adapted_model(source, with_weights=merge_adapter) if source.can_be_reloaded else None
    kind: Kind = "model" if adapted is None else "merged" if merge_adapter else "adapter"
    if adapted is None:
        _refuse_adapters(weights, merge_adapter)
    model = empty_model(source.config(), source.loading) if adapted is None else adapted
    sources = match_names(model, weights)
    if adapted is not None:  # the weights that a quantized policy is merged into are others by their bits
        comparable = merge_adapter and source.loading.quantization is None
        check_adapter_state(
            adapter_state(adapted, frozen_fingerprint(adapted) if comparable else None), weights.adapter
        )
    with appearing(output) as partial:
        partial.mkdir()
        if adapted is None:
            _write_weights(model, weights, sources, partial, max_shard_size, dtype)
            _write_config(model, as_written(weights.tensors[next(iter(sources.values()))], dtype), partial)
        else:
            trained = trained_sources(model, sources, weights.path)
            tensors = weights.load(trained.values(), dtype)
            tensors = {name: tensors[source] for name, source in trained.items()}
            if merge_adapter:
                say_dequantized(source)
                save_model(merge(model, tensors).to(dtype or model.dtype), partial, max_shard_size)
            else:
                write_adapter(model, tensors, partial)
        origin = Origin(settings, *files_of_run(weights.path, weights.step))
        write_beside(source, _generation_config(source, model), partial, kind, origin)
    return output


def _refuse_adapters(weights: SavedWeights, merge_adapter: bool) -> None:
    for name in weights.tensors:
        if "lora_" in name:
            raise ValueError(
                f"{weights.path} holds an adapter ({name!r}), the policy has none: set model.lora as in training. Of a "
                "model object with an adapter, call gvpo_lightning.checkpointing.weights.load_weights(module.policy, "
                "ckpt_path) and module.export(folder)."
            )
    if merge_adapter:
        raise ValueError("There is no adapter to merge: the policy's own weights were trained. Leave --merge out.")


def _write_weights(
    model: PreTrainedModel,
    weights: SavedWeights,
    sources: Mapping[str, str],
    folder: Path,
    max_shard_size: str | int,
    dtype: torch.dtype | None,
) -> None:
    planned = {}
    for name, source in sources.items():
        if name in (model._keys_to_ignore_on_save or ()):
            continue
        saved = weights.tensors[source]
        planned[name] = torch.empty(saved.shape, dtype=as_written(saved, dtype), device="meta")
    split = split_torch_state_dict_into_shards(
        planned, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    convert = _conversion(
        model, [{name: planned[name] for name in names} for names in split.filename_to_tensors.values()]
    )
    files: dict[str, str] = {}
    for file, names in split.filename_to_tensors.items():
        loaded = weights.load([sources[name] for name in names], dtype)
        shard = convert({name: loaded.pop(sources[name]) for name in names})
        save_file({name: tensor.contiguous() for name, tensor in shard.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(shard, file)
        del shard  # or the next one would be loaded beside it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(files.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _conversion(model: PreTrainedModel, shards: list[Tensors]) -> Callable[[Tensors], Tensors]:
    """What gives a shard's tensors the names and shapes that `save_pretrained` would give them.

    transformers holds the weights of some models, such as the experts of mixtures, in another form than their files
    do. Where the files' form takes tensors of several shards at once it stays as it is, which it can load too.
    """

    def revert(tensors: Tensors) -> Tensors:
        return revert_weight_conversion(model, tensors)

    def shapes(tensors: Tensors) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in tensors.items()}

    whole = shapes(revert({name: tensor for shard in shards for name, tensor in shard.items()}))
    try:
        parts = [shapes(revert(shard)) for shard in shards]
    except Exception:  # whatever a conversion does without some of its tensors
        return lambda tensors: tensors
    same = whole == {name: shape for part in parts for name, shape in part.items()}
    return revert if same else lambda tensors: tensors


def _write_config(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    config: Any = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    if getattr(model, "_auto_class", None) is not None:  # Python code that came with the policy
        custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)


def _generation_config(source: PolicySource, model: PreTrainedModel) -> GenerationConfig:
    if not isinstance(source.given, str):
        return copy.deepcopy(source.given.generation_config)
    beneath = adapter_base(source.given, source.loading)
    return (
        load_generation_config(source.given, source.loading)
        or (load_generation_config(*beneath) if beneath else None)
        or model.generation_config  # the one that transformers makes of the model's config
    )
