"""Prompts as rows: dicts with a `prompt`, whose other columns reach the reward; and a prompt's token ids."""

from collections.abc import Mapping
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

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
