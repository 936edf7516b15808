"""`gvpo export`: a checkpoint of any strategy becomes a Hugging Face folder, one shard of it in memory at a time.

Parameter names, shapes and ties come from the policy's config, built without storage; no GPU, process group or data is
needed.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from gvpo_lightning.saved_weights import SavedWeights, as_written, match_names, open_weights

if TYPE_CHECKING:
    from gvpo_lightning.sampling_module import SamplingModule

Tensors = dict[str, Tensor]


def export_checkpoint(
    module: "SamplingModule",
    ckpt_path: str | Path,
    output: str | Path,
    *,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write the checkpoint's policy, with tokenizer and generation config, as transformers loads it.

    Args:
        module: names policy and tokenizer; its weights are neither loaded nor used.
        ckpt_path: a file, or the folder of a distributed checkpoint of any number of ranks.
        output: a folder that does not exist or is empty; it appears when it is complete.
        max_shard_size: of one safetensors file, in bytes or such as "5GB"; also what is in memory at a time. A larger
            tensor gets a file of its own.
        dtype: of the written floating-point tensors; default: the checkpoint's.

    Raises:
        FileNotFoundError, ValueError: there is no such checkpoint, it does not fit the policy's config or is not
            whole, or `output` is in use.
    """
    output = Path(output).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and is not an empty folder: remove it, or give another one.")
    weights = open_weights(ckpt_path)
    _refuse_adapters(weights)
    model = _without_storage(module)
    sources = match_names(model, weights)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        _write_weights(model, weights, sources, partial, max_shard_size, dtype)
        _write_configs(module, model, as_written(weights.tensors[next(iter(sources.values()))], dtype), partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _refuse_adapters(weights: SavedWeights) -> None:
    for name in weights.tensors:
        if "lora_" in name:
            raise ValueError(
                f"{weights.path} holds an adapter ({name!r}), which `gvpo export` can't write. In Python: build the "
                "module with the adapter as for training, and call gvpo_lightning.saved_weights.load_weights("
                "module.policy, ckpt_path) and module.export(folder)."
            )


def _without_storage(module: "SamplingModule") -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(module.model_config()))


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


def _write_configs(module: "SamplingModule", model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    generation_config = _generation_config(module, model)
    sample_at_a_temperature(generation_config)
    generation_config.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)


def _generation_config(module: "SamplingModule", model: PreTrainedModel) -> GenerationConfig:
    source = module.policy_source
    if not isinstance(source, str):
        return copy.deepcopy(source.generation_config)
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:  # there is none: the one that transformers makes of the model's config
        return model.generation_config


def sample_at_a_temperature(generation_config: GenerationConfig) -> None:
    """Make a temperature mean that samples are drawn, without which transformers refuses to save it."""
    if not generation_config.do_sample and generation_config.temperature is not None:
        generation_config.do_sample = True
