"""Prompts in, sampled completions out, with transformers' own `generate`."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gvpo_lightning.data.batch import CompletionBatch, collate_completions
from gvpo_lightning.data.rows import decode_behind
from gvpo_lightning.policy.generation import without_generation_config
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
    pad_token_id = padding_id(model, tokenizer, stops)
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
            stop_strings = StopStrings(settings.stop_strings, tokenizer, stops, len(part))
            sequences = model.generate(  # type: ignore[operator]
                input_ids=padded.prompt_ids,
                attention_mask=padded.prompt_mask.to(torch.int64),
                max_new_tokens=settings.max_new_tokens,
                **sampling_arguments(settings),
                stopping_criteria=StoppingCriteriaList([stop_strings] if settings.stop_strings else []),
                eos_token_id=list(stops),
                pad_token_id=pad_token_id,
                synced_gpus=False,  # a sharded model has been gathered, and other ranks may have other numbers
            )
            new_tokens = sequences[:, padded.prompt_ids.shape[1] :].tolist()
            for sampled, end in zip(new_tokens, stop_strings.ends, strict=True):
                ids = cut_after_stop(sampled, stops) if end is None else sampled[:end]
                completions.append(ids)
                truncated.append(end is None and (not ids or ids[-1] not in stops))
                check_end(model, sampled, len(ids), truncated[-1], settings.max_new_tokens, pad_token_id)
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


class StopStrings(StoppingCriteria):
    """Ends a row with the token that completes a stop string in the text of its own completion.

    transformers' own criterion takes prompt and completion together, and so ends what the prompt alone has begun.

    Attributes:
        ends: for each row, after how many tokens a stop string has ended it; None where none has.
    """

    def __init__(
        self, stop_strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], num_rows: int
    ) -> None:
        self.ends: list[int | None] = [None] * num_rows
        self._stop_strings, self._tokenizer, self._stops = stop_strings, tokenizer, stops
        self._longest = max(map(len, stop_strings), default=0)
        self._num_tokens = 0
        self._tails: dict[int, list[int]] = {row: [] for row in range(num_rows)}  # of the rows that go on

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        """(num_rows,) bool: the rows that have ended; `input_ids` (num_rows, L) end with the newest tokens."""
        self._num_tokens += 1
        newest = input_ids[:, -1].tolist()
        for row, tail in list(self._tails.items()):
            tail.append(newest[row])
            text = decode_behind(tail, self._tokenizer, self._stops)
            if any(stop in text for stop in self._stop_strings):
                self.ends[row] = self._num_tokens
            elif newest[row] not in self._stops:
                self._shorten(tail, text)
                continue
            del self._tails[row]  # what follows is padding
        return torch.tensor([end is not None for end in self.ends], device=input_ids.device)

    def _shorten(self, tail: list[int], text: str) -> None:
        """Forget the tokens that are too far back for a stop string that is still to come.

        What is kept must say by itself what it says with the others in front: so not from the middle of a character
        on, whose bytes may be spread over several tokens.
        """
        if len(tail) < 2 * self._longest:
            return
        kept = decode_behind(tail[-self._longest :], self._tokenizer, self._stops)
        if len(kept) >= self._longest and "\N{REPLACEMENT CHARACTER}" not in kept and text.endswith(kept):
            del tail[: -self._longest]


def check_end(
    model: PreTrainedModel, sampled: Sequence[int], length: int, truncated: bool, max_new_tokens: int, pad_token_id: int
) -> None:
    """Assert that something explains where a completion ends, which is the first `length` of the tokens.

    Else padding would be trained as if it had been drawn.
    """
    is_explained = length == max_new_tokens if truncated else all(token == pad_token_id for token in sampled[length:])
    assert is_explained, (
        f"{type(model).__name__}.generate must go on to a stop token, a stop string or generation.max_new_tokens="
        f"{max_new_tokens}, and then pad, but a completion has ended otherwise, with "
        f"{list(sampled)[max(length - 4, 0) : length + 4]} around its end: take one with transformers' own generate."
    )


def padding_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> int:
    """The tokenizer's padding, or where the model has no such token another one, since padding is masked."""
    vocab_size = model.config.get_text_config().vocab_size
    return next(i for i in (tokenizer.pad_token_id, *stops, 0) if i is not None and i < vocab_size)
