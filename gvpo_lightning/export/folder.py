"""What an exported folder holds: a policy's weights, and beside them what transformers and people need."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gvpo_lightning.export.adapter import merged_policy, write_adapter
from gvpo_lightning.export.model_card import Kind, Origin, write_card
from gvpo_lightning.policy.lora import is_adapted
from gvpo_lightning.policy.source import PolicySource


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
