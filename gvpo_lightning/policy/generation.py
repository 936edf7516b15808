"""What every call of transformers' own `generate` needs, in the start-up probe and in rollouts."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from gvpo_lightning.policy.config_check import all_configs


@contextlib.contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation config, of which generate() takes up all that it isn't given.

    A top_k, min_p, bad_words_ids or repetition_penalty from there would take support away unseen, and
    num_return_sequences would change the number of completions. Nor does it give the logits of its routers, of which
    no one wants a loss here, and for which some models need a mask as long as the newest token alone.
    """
    holder: Any = getattr(model, "get_base_model", lambda: model)()  # beneath peft's wrapper
    own = holder.generation_config
    asking = [config for config in all_configs(model.config) if getattr(config, "output_router_logits", False)]
    holder.generation_config = GenerationConfig()
    for config in asking:
        config.output_router_logits = False
    try:
        yield
    finally:
        holder.generation_config = own
        for config in asking:
            config.output_router_logits = True
