"""Datasets and their splits; prompts as rows, dicts with a `prompt`, whose other columns reach the reward.

Prompts and completions become tokens here, and tokens the text that rewards read.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, ReadInstruction, load_from_disk
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.data.json_text import load_with_text

Row = dict[str, Any]


def check_default_collate(row: Row) -> None:
    """Raise ValueError for rows that torch's default collate would take apart."""
    nested = [name for name, value in row.items() if isinstance(value, (list, tuple, dict))]
    if nested:
        raise ValueError(
            f"torch's default collate takes the lists in the columns {nested} apart and mixes up the rows: "
            "give the DataLoader collate_fn=list."
        )


def rows_of(batch: Any) -> list[Row]:
    """A batch of prompts as a list of rows: from rows, from a dict of columns (torch's default collate), or a Dataset.

    Raises:
        ValueError: neither, or columns that torch's default collate has mixed up.
    """
    if isinstance(batch, Mapping):
        columns = {name: v.tolist() if isinstance(v, torch.Tensor) else list(v) for name, v in batch.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1 or any(isinstance(p, Mapping) for p in columns.get("prompt", ())):
            raise ValueError(
                f"The columns of a batch of prompts don't fit together, lengths {lengths}: torch's default collate "
                "takes lists, such as conversations, apart. Give the DataLoader collate_fn=list."
            )
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows = list(batch)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of the prompts must be a dict with a 'prompt', got {type(row).__name__}.")
    return rows


def prompt_text(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    """A plain prompt as it is, or a conversation through the tokenizer's chat template.

    Raises:
        ValueError: neither a string nor a list of messages; no chat template to use, or one that refuses the messages.
    """
    if isinstance(prompt, str):
        return prompt
    if not (isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)):
        raise ValueError(
            f"A prompt must be a string or a list of {{'role', 'content'}} messages, got {type(prompt).__name__}: "
            f"{str(prompt)[:80]!r}."
        )
    if tokenizer.chat_template is None:
        raise ValueError(
            "The prompts are conversations, but the tokenizer has no chat template: "
            "set tokenizer.chat_template, or give the prompts as text."
        )
    try:
        return str(tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(f"The tokenizer's chat template refuses {str(prompt)[:80]!r}: {error}") from error


def encode_prompt(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a plain prompt, or of a conversation through the tokenizer's chat template.

    A plain prompt gets the special tokens that the tokenizer puts in front, unless it begins with them itself, and
    no end token, which the model would have to go on after.

    Raises:
        ValueError: no tokens; and as in `prompt_text`.
    """
    text, is_plain = prompt_text(prompt, tokenizer), isinstance(prompt, str)
    encoded = tokenizer(text, add_special_tokens=is_plain, return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    if is_plain:
        added: list[int] = encoded["special_tokens_mask"]  # 1 = by the tokenizer, not in the text
        while ids and added[len(ids) - 1] and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        head = [token for token, _ in itertools.takewhile(lambda pair: pair[1], zip(ids, added, strict=False))]
        if head and ids[len(head) : 2 * len(head)] == head:
            ids = ids[len(head) :]
    if not ids:
        raise ValueError(f"A prompt must have at least one token, got none from {prompt!r}.")
    return ids


def encode_behind(prompt: str | list[dict[str, Any]], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text as it stands behind its prompt; without special tokens other than its own.

    Tokenizers of the Llama 2 kind take a text of its own for the beginning of a sentence, and put a space there. Where
    the text's first token and the prompt's last would be one, the prompt keeps its tokens, since completions are
    sampled from those, and the text is tokenized behind something else.

    Raises:
        ValueError: as in `prompt_text`.
    """

    def plain(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False)["input_ids"]

    for before in (prompt_text(prompt, tokenizer), "\n", "=", "a"):
        head, both = plain(before), plain(before + text)
        if head and both[: len(head)] == head:
            return both[len(head) :]
    return plain(text)


def decode_behind(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str:
    """The text of a completion's ids, special tokens and all, as it stands behind its prompt.

    On its own it would lose its first space with tokenizers of the Llama 2 kind. So it is decoded behind one of the
    `ends`, the tokens that end a completion.
    """
    front = str(tokenizer.decode(list(ends[:1]), clean_up_tokenization_spaces=False))
    text = str(tokenizer.decode([*ends[:1], *ids], clean_up_tokenization_spaces=False))
    return text.removeprefix(front)


def completion_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> str:
    """What people and rewards read of a completion: its text, as it stands behind its prompt.

    Special tokens are text like any other, but for the `ends`, which end completions, the padding token and the one
    for what is unknown, which stand for no text.
    """
    silent = {*ends, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return decode_behind([token for token in ids if token not in silent], tokenizer, ends)


def load_splits(path: str, name: str | None = None, key: str = "data.path", revision: str | None = None) -> DatasetDict:
    """Every split of a dataset: hub name, `save_to_disk` folder, JSON lines or parquet file; text in JSON stays text.

    Raises:
        ValueError: nothing readable is there.
    """
    location, builders = Path(path), {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    try:
        if (location / "dataset_dict.json").exists() or (location / "state.json").exists():
            loaded = load_from_disk(path)
        elif location.suffix in builders:
            loaded = load_with_text(builders[location.suffix], data_files=path)
        else:
            loaded = load_with_text(path, name, revision=revision)
    except Exception as error:  # the libraries beneath raise dozens of types; the user needs one line
        if location.is_file() and not location.stat().st_size:
            raise ValueError(f"{key}={path!r} is an empty file.") from error
        reasons = [error, *causes(error)]
        chain = "; ".join(f"{type(reason).__name__}: {reason}" for reason in reasons)
        raise ValueError(f"{key}={path!r} can't be read as a dataset: {chain}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)


def causes(error: BaseException) -> list[BaseException]:
    """What an error was raised from, outermost first."""
    return [] if error.__cause__ is None else [error.__cause__, *causes(error.__cause__)]


def cut_split(available: DatasetDict, expression: str) -> Dataset:
    """The rows that a split expression such as "train[:80%]" or "test[10:20]" names.

    Raises:
        ValueError: no such split, or not an expression.
    """
    try:
        parts = ReadInstruction.from_spec(expression).to_absolute({k: len(v) for k, v in available.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{expression!r} names no split; there are {sorted(available)}: {error}") from error
    if len(parts) != 1:
        raise ValueError(f"{expression!r} joins several splits; name one, or a slice of one.")
    dataset = available[parts[0].splitname]
    rows = range(len(dataset))[parts[0].from_ : parts[0].to]
    return dataset.select(rows or [])  # an empty range that starts past the end is refused
