"""`PolicySource`: where the policy comes from, and what can be known of it before it is loaded."""

from transformers import PretrainedConfig


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes; None where its config names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
