"""What must hold of a reference that is a model of its own."""

from transformers import PretrainedConfig

from gvpo_lightning.policy.loading import load_config
from gvpo_lightning.policy.source import PolicySource


def check_reference_model(name: str, source: PolicySource) -> PretrainedConfig:
    """The config of the model `name`; ValueError where it can't score what the policy says."""
    config = load_config(name, source.loading_of(name), setting="reference.model")
    vocab_size = config.get_text_config().vocab_size
    if vocab_size < source.vocab_size():
        raise ValueError(
            f"reference.model={name!r} has {vocab_size} token ids, fewer than the policy's {source.vocab_size()}: it "
            "can't score what the policy says. Take a model of the same family, with the policy's tokenizer."
        )
    return config
