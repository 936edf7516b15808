"""What an exported folder holds beside the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedModel

from gvpo_lightning.export.model_card import Kind, write_card

if TYPE_CHECKING:
    from gvpo_lightning.policy_module import PolicyModule


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str | int = "5GB") -> None:
    """A whole model, with a generation config that transformers agrees to save."""
    sample_at_a_temperature(model.generation_config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def write_beside(
    module: "PolicyModule",
    generation_config: GenerationConfig,
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any] | None,
    summary: Mapping[str, Any] | None,
) -> None:
    """What belongs into an exported folder beside the weights: generation config, tokenizer and model card."""
    sample_at_a_temperature(generation_config)
    generation_config.save_pretrained(folder)
    module.tokenizer.save_pretrained(folder)
    write_card(folder, module, kind, config, summary)


def sample_at_a_temperature(generation_config: GenerationConfig) -> None:
    """Make a temperature mean that samples are drawn, without which transformers refuses to save it."""
    if not generation_config.do_sample and generation_config.temperature is not None:
        generation_config.do_sample = True
