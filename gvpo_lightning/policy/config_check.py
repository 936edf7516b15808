"""What a model's config says of it before it is loaded: how long a row may be, and what can't be trained."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig


def all_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A config and those of its parts."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PretrainedConfig):
            yield from all_configs(value)


@dataclass(frozen=True)
class RowLimit:
    """The most tokens that a row may have, prompt and completion; None: any number. `reason`: what says so."""

    tokens: int | None
    reason: str = "the model's context"

    def shorter(self, other: "RowLimit") -> "RowLimit":
        """Of the two."""
        return min((self, other), key=lambda limit: math.inf if limit.tokens is None else limit.tokens)


def context_limit(config: PretrainedConfig) -> RowLimit:
    """How much a model takes; a config need not name a limit."""
    tokens = getattr(config.get_text_config(), "max_position_embeddings", None)
    return RowLimit(None if tokens is not None and tokens < 1 else tokens)  # XLNet's says -1


def training_limit(config: PretrainedConfig) -> RowLimit:
    """The same of rows that are trained: up to where a token's position means the same in every batch.

    Beyond `original_max_position_embeddings` the `rope_type` "longrope" takes its frequencies from the longest row of
    a batch, as "dynamic" does beyond `max_position_embeddings`; a row's log-probs would change with its company.
    """
    limit = context_limit(config)
    for part in all_configs(config):
        rope = vars(part).get("rope_parameters") or {}
        context = getattr(part, "max_position_embeddings", None)
        for parameters in [rope, *rope.values()]:  # some have one set of parameters for each type of layer
            kind = str(parameters.get("rope_type")) if isinstance(parameters, dict) else ""
            if kind == "longrope" or "dynamic" in kind:
                original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
                reason = (
                    f"the original length of the model's rope_type={kind!r} (beyond it, a row's positions depend on "
                    "the longest row of its batch, and log-ratios are wrong)"
                )
                limit = limit.shorter(RowLimit(original or context, reason))
    return limit


def check_router_loss(config: PretrainedConfig) -> None:
    """Raise ValueError where a model is to add its routers' auxiliary loss, which is not trained."""
    if any(getattr(part, "output_router_logits", False) for part in all_configs(config)):
        raise ValueError(
            f"The policy's config ({type(config).__name__}) has output_router_logits=True, which adds the routers' "
            "auxiliary loss to a language model's, but that is not trained here: set output_router_logits to false in "
            "the model's config (its config.json, or the config of a model that you built)."
        )
