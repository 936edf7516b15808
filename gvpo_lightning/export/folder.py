"""What an exported folder holds: a policy's weights or its adapter's, and what transformers and people need beside."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gvpo_lightning.export.model_card import Kind, Origin, write_card
from gvpo_lightning.policy.loading import adapter_base, empty_model, load_base_model
from gvpo_lightning.policy.lora import add_lora, import_peft, is_adapted, trained_names
from gvpo_lightning.policy.source import PolicySource
from gvpo_lightning.policy.weights import unwrapped_name


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
        ValueError: there is no adapter to merge, or it can't be done with this policy.
    """
    kind: Kind = "merged" if merge_adapter else "adapter" if is_adapted(policy) else "model"
    folder.mkdir(parents=True, exist_ok=True)
    sample_at_a_temperature(policy.generation_config)
    if merge_adapter:
        save_model(merged_policy(policy, source, state), folder)
    elif is_adapted(policy):
        write_adapter(policy, dict(policy.named_parameters()) if state is None else state, folder)
    else:
        policy.save_pretrained(folder, state_dict=state)
    write_beside(source, policy.generation_config, folder, kind, origin)


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """A whole model, with a generation config that transformers agrees to save."""
    sample_at_a_temperature(model.generation_config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def write_beside(
    source: PolicySource, generation_config: GenerationConfig, folder: Path, kind: Kind, origin: Origin
) -> None:
    """What belongs into an exported folder beside the weights: generation config, tokenizer and model card."""
    sample_at_a_temperature(generation_config)
    generation_config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    write_card(folder, source, kind, origin)


def sample_at_a_temperature(generation_config: GenerationConfig) -> None:
    """Make a temperature mean that samples are drawn, without which transformers refuses to save it."""
    if not generation_config.do_sample and generation_config.temperature is not None:
        generation_config.do_sample = True


def adapted_model(source: PolicySource, *, with_weights: bool) -> Any:
    """The policy beneath an adapter of the run's shape, not quantized; without weights, no memory is taken.

    None where the policy, given by name, has no adapter.
    """
    name = source.given
    assert isinstance(name, str)
    found = adapter_base(name, source.loading)
    if found is None and source.lora is None:
        return None
    beneath, loading = found or (name, source.loading)
    model = load_base_model(beneath, loading.whole()) if with_weights else empty_model(source.config(), loading)
    if found is None:
        assert source.lora is not None
        adapted = add_lora(model, source.lora, seed=0)
    else:
        peft = import_peft(f"policy={name!r}, an adapter,")
        adapter = peft.PeftConfig.from_pretrained(name, revision=source.loading.revision)
        adapter.inference_mode = False  # as in the folder's file, nothing would be trained
        adapted = peft.get_peft_model(model, adapter)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = beneath, loading.revision
    return adapted


def trained_sources(model: Any, sources: Mapping[str, str], checkpoint: Path) -> dict[str, str]:
    """Of the names that a checkpoint has the model's tensors under, those of the adapter's.

    Raises:
        ValueError: the model has no weights to train, or the checkpoint some beside them, but not all.
    """
    trained, saved = trained_names(model), sources.keys()
    others = sorted(saved - trained)
    if not trained or (others and not saved >= {name for name, _ in model.named_parameters()}):  # FSDP1's has all
        raise ValueError(
            f"{checkpoint} has {(others or sorted(saved))[0]!r}, which is not trained in the policy ({len(trained)} "
            "tensors are). Give the policy that this checkpoint was trained from (model.policy, model.lora)."
        )
    return {name: sources[name] for name in sorted(trained)}


def write_adapter(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """The adapter's weights, given by their names in the model, and its config, as peft loads them.

    The model may be wrapped by FSDP1, whose names peft would not find in `tensors`.
    """
    peft = import_peft("An adapter's export")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    state = {name: tensors[unwrapped_name(name)] for name in names if unwrapped_name(name) in tensors}
    adapter = peft.get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    assert adapter, "peft has found no adapter"
    save_file(
        {unwrapped_name(name): tensor.detach().cpu().contiguous() for name, tensor in adapter.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.save_pretrained(folder)


@torch.no_grad()
def merge(model: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The model with these weights of its adapter added to its own, in their dtype, as a plain transformers model."""
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[name].copy_(tensor)
    return model.merge_and_unload(safe_merge=True)


def merged_policy(policy: Any, source: PolicySource, state: Mapping[str, Tensor] | None) -> Any:
    """The policy with its adapter merged in; `state` is the whole of its weights where it is sharded.

    Raises:
        ValueError: it has no adapter, or was given as a model object and is sharded.
    """
    if not hasattr(policy, "merge_and_unload"):
        raise ValueError("There is no adapter to merge: the policy's own weights were trained. Leave merge out.")
    if source.can_be_reloaded:
        trained, weights = trained_names(policy), dict(policy.named_parameters()) if state is None else state
        say_dequantized(source)
        return merge(adapted_model(source, with_weights=True), {name: weights[name].cpu() for name in trained})
    if state is not None:
        raise ValueError("A sharded policy can only be merged if it is given by name (policy, lora): leave merge out.")
    return copy.deepcopy(policy).merge_and_unload(safe_merge=True)


def say_dequantized(source: PolicySource) -> None:
    """Tell what of a quantized policy is merged into."""
    if source.loading.quantization is not None:
        rank_zero_info(
            f"The adapter was trained on weights in {source.loading.quantization} and is merged into those of "
            f"{source.given!r} as its files hold them, in {source.loading.whole().dtype}: log-probs differ by "
            "the quantization's error."
        )
