"""Prompts in, sampled completions out, with transformers' own `generate`."""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from gvpo_lightning.batch import CompletionBatch, collate_completions
from gvpo_lightning.policy import stop_token_ids


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are sampled.

    Attributes:
        max_new_tokens: completions that reach it without an EOS or a stop string are truncated (kept, counted).
        temperature: the sampler's own; log-probs are taken at the module's `temperature`. 0 always takes the
            likeliest token.
        top_k, top_p, min_p: 0, 1.0 and 0.0 sample from the whole distribution. Anything else takes support
            away, as temperature 0 does, and with it GVPO's unique optimum.
        batch_size: completions generated at once; bounds the key-value cache's memory.
        stop_strings: texts that end a completion as an EOS does, such as "</answer>"; they stay in it.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    batch_size: int = 256
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, rule, holds in (
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("temperature", ">= 0", self.temperature >= 0),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "in (0, 1]", 0 < self.top_p <= 1),
            ("min_p", "in [0, 1)", 0 <= self.min_p < 1),
            ("batch_size", "at least 1", self.batch_size >= 1),
            ("stop_strings", "texts that are not empty", all(self.stop_strings)),
        ):
            if not holds:
                raise ValueError(f"generation.{name} must be {rule}, got {getattr(self, name)}.")


def encode_prompt(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a plain prompt, or of a conversation through the tokenizer's chat template.

    Raises:
        ValueError: neither a string nor a list of messages; no tokens; no chat template to use, or one that
            refuses the messages.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        if tokenizer.chat_template is None:
            raise ValueError(
                "The prompts are conversations, but the tokenizer has no chat template: "
                "set tokenizer.chat_template, or give the prompts as text."
            )
        try:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(f"The tokenizer's chat template refuses {str(prompt)[:80]!r}: {error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        raise ValueError(
            f"A prompt must be a string or a list of {{'role', 'content'}} messages, got {type(prompt).__name__}: "
            f"{str(prompt)[:80]!r}."
        )
    if not ids:
        raise ValueError(f"A prompt must have at least one token, got none from {prompt!r}.")
    return ids


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


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode inside (gradient checkpointing would switch the key-value cache off), then as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
