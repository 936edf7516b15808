"""The offline format: completions recorded with their prompts, to be trained on later.

One row a prompt, as JSON lines or parquet; lists have one entry a completion, and groups may differ in size:

| column               | what                                                             | without it              |
|----------------------|------------------------------------------------------------------|-------------------------|
| `prompt`             | text, or a list of {"role", "content"} messages                  | an error                |
| `completions`        | texts, as they stand behind the prompt                           | an error                |
| `rewards`            | numbers; null: this one has none and leaves its group            | the reward is asked     |
| `token_ids`          | lists of token ids, with the end token unless truncated          | the texts are tokenized |
| `truncated`          | true: without an end token                                       | what the token ids say  |
| `sources`            | names, kept apart in what is logged, as `file.<name>`            | all are `file`          |
| `reference_logprobs` | lists of log-probs of these token ids under the reference        | the reference is asked  |
| `reference`          | which model, tokenizer, dtype and temperature these come from    |                         |

All other columns are left as they are. `gvpo predict` writes this format, `gvpo reference` adds the last two columns.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gvpo_lightning.data.batch import Completion
from gvpo_lightning.data.rows import cut_split, encode_behind, load_splits
from gvpo_lightning.rewards.values import as_text


def prompt_key(prompt: Any) -> str:
    """What makes two prompts the same: their text or messages, without keys that are null (as parquet fills in)."""
    if isinstance(prompt, str):
        return prompt
    messages = [{k: v for k, v in message.items() if v is not None} for message in prompt]
    return json.dumps(messages, sort_keys=True, ensure_ascii=False, default=as_text)


def encode_completion(
    text: str, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], *, prompt: Any = "", truncated: bool = False
) -> torch.Tensor:
    """(T,) token ids of a completion's text behind its prompt and, unless it is truncated, of the end."""
    ids = encode_behind(prompt, text, tokenizer)
    end = next((position for position, token in enumerate(ids) if token in stops), None)
    if end is not None:
        ids = ids[: end + 1]
    elif not truncated:
        ids = [*ids, tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]]
    return torch.tensor(ids, dtype=torch.int64)


class OfflineFile:
    """A file in the offline format, checked row by row when it is opened.

    Raises:
        ValueError: it can't be read, or names the row that is not in the format.
    """

    def __init__(
        self,
        path: str,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
    ) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.rows = cut_split(load_splits(path, key="sources.file.path"), split)
        if not len(self.rows):
            raise ValueError(f"sources.file.path={path!r}, {split!r}: there are no rows.")
        self._numbers: dict[str, list[int]] = {}
        self.source_names: set[str] = set()
        self.references: list[dict[str, Any]] = []  # the different identities in the column `reference`
        self.num_without_logprobs = self.num_without_rewards = 0
        mismatches = 0
        for number, row in enumerate(self.rows):
            try:
                check_row(row, vocab_size)
            except ValueError as error:
                raise ValueError(f"Row {number} of {path!r}: {error}") from error
            self._numbers.setdefault(prompt_key(row["prompt"]), []).append(number)
            self.source_names |= {source_name(name) for name in row.get("sources") or [None]}
            self.num_without_logprobs += row.get("reference_logprobs") is None
            self.num_without_rewards += row.get("rewards") is None
            if row.get("reference") is not None and row["reference"] not in self.references:
                self.references.append(row["reference"])
            if number < 32 and row.get("token_ids"):
                mismatches += self._decodes_otherwise(row)
        if mismatches > min(len(self.rows), 32) / 2:
            raise ValueError(
                f"The token_ids in {path!r} don't decode to its completions with this tokenizer: they were made by "
                "another one. Leave the column token_ids out, and the texts are tokenized anew."
            )

    def _decodes_otherwise(self, row: Mapping[str, Any]) -> bool:
        """Compared without special tokens, as the texts of files of earlier versions have none."""

        def read(ids: list[int]) -> str:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

        return any(
            read(ids) not in (text.strip(), read(self.tokenizer(text, add_special_tokens=False)["input_ids"]))
            for ids, text in zip(row["token_ids"], row["completions"], strict=True)
        )

    def __contains__(self, prompt: Any) -> bool:
        return prompt_key(prompt) in self._numbers

    def group_size(self, prompt: Any) -> int:
        """Completions that are recorded for a prompt."""
        return sum(len(self.rows[n]["completions"]) for n in self._numbers.get(prompt_key(prompt), ()))

    def completions(self, prompt: Any, stops: Sequence[int]) -> list[Completion]:
        """All that are recorded for a prompt, from all of its rows; `stops` end what must be tokenized."""
        rows = ({**self.rows[number], "prompt": prompt} for number in self._numbers.get(prompt_key(prompt), ()))
        return [completion for row in rows for completion in row_completions(row, self.tokenizer, stops)]


def row_completions(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> Iterator[Completion]:
    """The completions of one row that `check_row` has passed."""
    nothing = [None] * len(row["completions"])
    columns = {name: row.get(name) or nothing for name in ("token_ids", "truncated", "sources", "reference_logprobs")}
    rewards: Any = row.get("rewards")
    for i, text in enumerate(row["completions"]):
        ids, logprobs = columns["token_ids"][i], columns["reference_logprobs"][i]
        truncated = bool(columns["truncated"][i])
        yield Completion(
            token_ids=torch.tensor(ids, dtype=torch.int64)
            if ids is not None
            else encode_completion(text, tokenizer, stops, prompt=row["prompt"], truncated=truncated),
            text=text,
            source=source_name(columns["sources"][i]),
            truncated=truncated or bool(ids and ids[-1] not in stops),
            reward=None if rewards is None else math.nan if rewards[i] is None else rewards[i],
            reference_logprobs=None if logprobs is None else torch.tensor(logprobs, dtype=torch.float32),
        )


def source_name(recorded: str | None) -> str:
    """The name under which a recorded completion is logged."""
    return f"file.{recorded}" if recorded else "file"


def check_row(row: Mapping[str, Any], vocab_size: int) -> None:
    """Raise ValueError for a row that is not in the offline format."""
    prompt, texts = row.get("prompt"), row.get("completions")
    is_talk = isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt)
    if not (isinstance(prompt, str) and prompt) and not is_talk:
        raise ValueError(f"prompt must be a text or a list of messages, got {prompt!r}.")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"completions must be a list of texts, got {str(texts)[:80]}.")
    for name in ("rewards", "token_ids", "truncated", "sources", "reference_logprobs"):
        values = row.get(name)
        if values is not None and (not isinstance(values, list) or len(values) != len(texts)):
            got = len(values) if isinstance(values, list) else type(values).__name__
            raise ValueError(f"{name} must have one entry a completion, {len(texts)}, got {got}.")
    for name, kind in (("rewards", (int, float)), ("truncated", bool), ("sources", str)):
        for value in row.get(name) or ():
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} has {value!r}, which is not what the column holds.")
    for ids in row.get("token_ids") or ():
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocab_size for i in ids):
            raise ValueError(f"token_ids must be lists of ids in [0, {vocab_size}), got {str(ids)[:80]}.")
    for number, logprobs in enumerate(row.get("reference_logprobs") or ()):
        ids = (row.get("token_ids") or [None] * len(texts))[number]
        if ids is None or not isinstance(logprobs, list) or len(logprobs) != len(ids):
            raise ValueError(f"reference_logprobs must have one number for each of the token_ids, not so in {number}.")
        if not all(isinstance(value, (int, float)) and -math.inf < value <= 0 for value in logprobs):
            raise ValueError(f"reference_logprobs must be numbers <= 0, got {str(logprobs)[:80]}.")
