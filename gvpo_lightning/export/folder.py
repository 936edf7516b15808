"""A policy as a Hugging Face folder: from memory, or by `gvpo export` from a checkpoint of any strategy.

Of a checkpoint one shard is in memory at a time. Parameter names, shapes and ties come from the policy's config, built
without storage; no GPU, process group or data is needed.

What was written is read back before it takes its name: a merged model, and a whole one from memory, gives the log-probs
of the policy; a LoRA adapter has its numbers. Not compared are a sharded policy that is exported whole, which no rank
could call alone, and a whole model from a checkpoint, of which no more than a shard is in memory: its tensors are the
checkpoint's to the bit, or rounded to `dtype`, and their names and shapes are all that the policy's config asks for.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save

from gvpo_lightning.atomic import appearing, delete, partial_path, remove_partials
from gvpo_lightning.checkpointing.state import adapter_state, check_adapter_state
from gvpo_lightning.checkpointing.weights import SavedWeights, as_written, match_names, open_weights
from gvpo_lightning.export.compare import LogProbs, check_adapter_written, check_model_written, example_logprobs
from gvpo_lightning.export.model_card import Kind, Origin, files_of_run, write_card
from gvpo_lightning.policy.adapter_check import is_tied
from gvpo_lightning.policy.generation import make_saveable
from gvpo_lightning.policy.loading import adapter_base, empty_model, is_quantized, load_generation_config
from gvpo_lightning.policy.lora import import_peft, is_adapted, trained_names
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.policy.weights import frozen_fingerprint, unwrapped_name

NO_ADAPTER = (
    "There is no adapter to merge: the policy's own weights were trained, or its adapter is none of a peft.PeftModel "
    "that can be merged. "
)


def export_policy(
    folder: Path,
    policy: Any,
    source: PolicySource,
    state: Mapping[str, Tensor] | None,
    origin: Origin,
    *,
    merge_adapter: bool,
) -> None:
    """Write a policy that is in memory; `state`: the whole of its weights where it is sharded.

    Raises:
        ValueError: there is no adapter to merge, it can't be done with this policy, or what was written is not it.
    """
    kind: Kind = "merged" if merge_adapter else "adapter" if is_adapted(policy) else "model"
    make_saveable(policy.generation_config)
    with _filling(folder, kind) as partial:
        if kind == "merged":
            write_merged(*adapted_policy(policy, source, state), partial)
        elif kind == "adapter":
            write_adapter(policy, policy.state_dict() if state is None else state, partial)
        else:
            policy.save_pretrained(partial, state_dict=state)
            # what transformers' own integration of adapters writes is read over a model that need not lie anywhere
            alone = getattr(policy, "_hf_peft_config_loaded", False)
            if state is None and not alone and not is_quantized(policy):
                check_model_written(partial, type(policy), example_logprobs(policy))
        write_beside(source, policy.generation_config, partial, kind, origin)


@contextmanager
def _filling(folder: Path, kind: Kind) -> Iterator[Path]:
    """A hidden folder within `folder`, whose files are moved there when all are written; nothing if that fails.

    Of what an earlier export has left there, a whole model's files give way, and to one an adapter's.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    remove_partials(folder)
    partial = partial_path(folder / "export")
    partial.mkdir()
    try:
        yield partial
        earlier = () if kind == "adapter" else (*folder.glob("model*.safetensors*"), *folder.glob("adapter_*"))
        for path in (*earlier, *(folder / path.name for path in partial.iterdir() if path.is_dir())):
            delete(path)
        for path in partial.iterdir():
            path.replace(folder / path.name)
    finally:
        delete(partial)
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """A whole model, with a generation config that transformers agrees to save."""
    make_saveable(model.generation_config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def write_beside(
    source: PolicySource, generation_config: GenerationConfig, folder: Path, kind: Kind, origin: Origin
) -> None:
    """What belongs into an exported folder beside the weights: generation config, tokenizer and model card."""
    make_saveable(generation_config)
    generation_config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    write_card(folder, source, kind, origin)


def trained_tensors(
    model: Any, sources: Mapping[str, str], weights: SavedWeights, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The adapter's tensors in a checkpoint, by their names in the model.

    Args:
        sources: the names that the checkpoint has the model's tensors under.
        dtype: see `SavedWeights.load`.

    Raises:
        ValueError: the model has no weights to train, or the checkpoint some beside them, but not all.
    """
    trained, saved = trained_names(model), sources.keys()
    others = sorted(saved - trained)
    if not trained or (others and not saved >= {name for name, _ in model.named_parameters()}):  # FSDP1's has all
        raise ValueError(
            f"{weights.path} has {(others or sorted(saved))[0]!r}, which is not trained in the policy ({len(trained)} "
            "tensors are). Give the policy that this checkpoint was trained from (model.policy, model.lora)."
        )
    loaded = weights.load([sources[name] for name in sorted(trained)], dtype)
    return {name: loaded[sources[name]] for name in sorted(trained)}


def write_adapter(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """The adapter's weights, given by their names in the model, and its config, as peft loads them; compared with both.

    The model may be wrapped by FSDP1, whose names peft would not find in `tensors`.

    Raises:
        ValueError: what was written is not the adapter.
    """
    peft, active = import_peft("An adapter's export"), model.active_adapter
    names = [name for own in (model.named_parameters, model.named_buffers) for name, _ in own(remove_duplicate=False)]
    state = {name: tensors[unwrapped_name(name)] for name in names if unwrapped_name(name) in tensors}
    adapter = peft.get_peft_model_state_dict(model, state_dict=state, adapter_name=active, save_embedding_layers=False)
    assert adapter, "peft has found no adapter"
    save_file(
        {unwrapped_name(name): tensor.detach().cpu().contiguous() for name, tensor in adapter.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = copy.copy(model.peft_config[active])
    config.inference_mode = True
    config.save_pretrained(folder)
    check_adapter_written(folder, model, tensors)


def write_merged(
    adapted: Any,
    trained: LogProbs | None,
    folder: Path,
    max_shard_size: str | int = "5GB",
    dtype: torch.dtype | None = None,
) -> None:
    """An adapter's weights added to those beneath it, in their dtype, as a plain transformers model; frees it.

    Where head and embeddings are one tensor and the embeddings are adapted, the model that is written has two.

    Args:
        adapted: the peft model.
        trained: what the written model is compared with; None: nothing.
        dtype: of what is written; default: the model's.

    Raises:
        ValueError: peft can't merge such an adapter, or what was written is not what was trained.
    """
    base = adapted.get_base_model()
    if is_tied(base) and hasattr(base.get_input_embeddings(), "base_layer"):
        head = base.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.update({"tie_word_embeddings": False})
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"The adapter can't be merged, export it alone (leave merge out): {error}") from error
    save_model(merged if dtype is None else merged.to(dtype), folder, max_shard_size)
    if trained is not None:
        merged.to("meta")  # or what is read back would be in memory beside it
        check_model_written(folder, type(merged), trained)


@torch.no_grad()
def set_trained(adapted: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a model these values of its adapter's weights, by their names."""
    own = dict(adapted.named_parameters())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def adapted_policy(
    policy: Any, source: PolicySource, state: Mapping[str, Tensor] | None
) -> tuple[Any, LogProbs | None]:
    """A copy of the policy to merge, and what the merged model is to be compared with.

    That is the policy itself, or where it is sharded or quantized the copy, which is neither, before it is merged. One
    that was given as a quantized object is not compared: peft rounds what it merges to the quantized weights again.

    Args:
        state: the whole of its weights where it is sharded.

    Raises:
        ValueError: it has no adapter, or was given as a model object and is sharded.
    """
    if not hasattr(policy, "merge_and_unload"):
        raise ValueError(NO_ADAPTER + "Leave merge out.")
    if source.can_be_reloaded:
        trained, weights = trained_names(policy), dict(policy.named_parameters()) if state is None else state
        say_dequantized(source)
        adapted = source.adapted(with_weights=True)
        set_trained(adapted, {name: weights[name] for name in trained})
        return adapted, example_logprobs(adapted if state is not None or is_quantized(policy) else policy)
    if state is not None:
        raise ValueError("A sharded policy can only be merged if it is given by name (policy, lora): leave merge out.")
    return copy.deepcopy(policy), None if is_quantized(policy) else example_logprobs(policy)


def say_dequantized(source: PolicySource) -> None:
    """Tell what of a quantized policy is merged into."""
    if source.loading.quantization is not None:
        rank_zero_info(
            f"The adapter was trained on weights in {source.loading.quantization} and is merged into those of "
            f"{source.given!r} as its files hold them, in {source.loading.whole().dtype}: log-probs differ by "
            "the quantization's error."
        )


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
    adapted = source.adapted(with_weights=merge_adapter) if source.can_be_reloaded else None
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
            tensors = trained_tensors(model, sources, weights, dtype)
            if merge_adapter:
                say_dequantized(source)
                set_trained(model, tensors)
                write_merged(model, example_logprobs(model), partial, max_shard_size, dtype or model.dtype)
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
        raise ValueError(NO_ADAPTER + "Leave --merge out.")


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
