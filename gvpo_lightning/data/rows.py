"""Datasets and their splits; prompts as rows, dicts with a `prompt`, whose other columns reach the reward."""

from collections.abc import Mapping
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
