"""Prompts in, sampled completions out, with transformers' own `generate`."""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.data.batch import CompletionBatch, collate_completions
from gvpo_lightning.policy.head import evaluating
from gvpo_lightning.policy.prepare import stop_token_ids
from gvpo_lightning.rollout.settings import GenerationSettings


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    num_completions: int | Sequence[int],
    settings: GenerationSettings,
    seed: int,
) -> CompletionBatch:
    """Sample `num_completions`, one number or one each, for each prompt (token ids); rows of one prompt are adjacent.

    Returns:
        a batch of as many rows in all on the model's device; group ids count the prompts.
        The same seed, weights and settings give the same completions; the caller's random state is kept.
    """
    device = model.device
    stops = stop_token_ids(model, tokenizer)
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    counts = [num_completions] * len(prompts) if isinstance(num_completions, int) else num_completions
    group_ids = [group for group, count in enumerate(counts) for _ in range(count)]
    repeated = [list(prompts[group]) for group in group_ids]
    completions: list[list[int]] = []
    truncated: list[bool] = []
    fork_rng = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    # eagerly: compiled layers would be compiled again for caches of all kinds
    with evaluating(model), without_generation_config(model), fork_rng, torch.compiler.set_stance("force_eager"):
        torch.manual_seed(seed)
        for start in range(0, len(repeated), settings.batch_size):
            part = repeated[start : start + settings.batch_size]
            padded = collate_completions(part, part, [False] * len(part), [0] * len(part), pad_token_id).to(device)
            sequences = model.generate(  # type: ignore[operator]
                input_ids=padded.prompt_ids,
                attention_mask=padded.prompt_mask.to(torch.int64),
                max_new_tokens=settings.max_new_tokens,
                **sampling_arguments(settings),
                **stop_arguments(settings, tokenizer),
                eos_token_id=list(stops),
                pad_token_id=pad_token_id,
                synced_gpus=False,  # a sharded model has been gathered, and other ranks may have other numbers
            )
            new_tokens = sequences[:, padded.prompt_ids.shape[1] :].tolist()
            for sampled in new_tokens:
                ids = cut_after_stop(sampled, stops)
                end = end_of_stop_string(ids, settings.stop_strings, tokenizer)
                completions.append(ids[:end])
                truncated.append(end is None and (not ids or ids[-1] not in stops))
    return collate_completions(repeated, completions, truncated, group_ids, pad_token_id).to(device)


def sampling_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """What `generate` is to draw from."""
    if settings.temperature == 0:
        return {"do_sample": False}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p or None,
    }


def cut_after_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """The ids up to and with the first stop token; by position, so a padding id that is also a stop is safe."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]


def stop_arguments(settings: GenerationSettings, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What `generate` needs to end at a stop string."""
    return {"stop_strings": list(settings.stop_strings), "tokenizer": tokenizer} if settings.stop_strings else {}


def end_of_stop_string(
    ids: Sequence[int], stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """How many of the ids it takes until their text has a stop string in it; None where it has none."""

    def has_stopped(length: int) -> bool:
        text = str(tokenizer.decode(list(ids[:length]), clean_up_tokenization_spaces=False))
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not has_stopped(len(ids)):
        return None
    return bisect.bisect_left(range(len(ids) + 1), True, key=has_stopped)


@contextlib.contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model without its own generation config, of which generate() takes up all that it isn't given.

    A top_k, min_p, bad_words_ids or repetition_penalty from there would take support away unseen, and
    num_return_sequences would change the number of completions.
    """
    holder: Any = getattr(model, "get_base_model", lambda: model)()  # beneath peft's wrapper
    own = holder.generation_config
    holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = own
