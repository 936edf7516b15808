"""Generation configs: what calls of transformers' own `generate` need, and what transformers can save."""

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


GREEDY = {"do_sample": False} | dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "typical_p"))


def make_saveable(generation_config: GenerationConfig) -> None:
    """Change what transformers loads with a warning and then refuses to save.

    What says how samples are drawn means that they are, but temperature 0 is greedy decoding. Settings of beams that
    there are none of, and a padding token that is none, are left out.
    """
    changes: dict[str, Any] = {}
    if (generation_config.num_beams or 1) == 1:
        changes |= {"length_penalty": None, "early_stopping": None}
    if (generation_config.pad_token_id or 0) < 0:
        changes["pad_token_id"] = None
    if generation_config.temperature is not None:
        changes |= {"do_sample": True} if generation_config.temperature else GREEDY
    vars(generation_config).update(changes)  # its own `update` refuses each change that leaves another mistake
    try:
        generation_config.validate(strict=True)
    except ValueError:
        vars(generation_config).update(do_sample=True)
