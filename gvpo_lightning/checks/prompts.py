"""What must hold of prompts before anything is trained."""

from collections.abc import Iterable, Mapping

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gvpo_lightning.data.rows import Row
from gvpo_lightning.policy.prompts import encode_prompt
from gvpo_lightning.policy.source import context_length
from gvpo_lightning.rewards import reward_columns
from gvpo_lightning.rewards.run import Rewards


def check_prompts(
    rows: Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    rewards: Rewards | None,
    max_new_tokens: int,
) -> int:
    """Raise ValueError, naming the row, for prompts that a policy with this config can't be given.

    That is: no `prompt`, a prompt that is neither text nor messages, no room for max_new_tokens in the
    model's context, or rows without the columns that the rewards need.

    Returns:
        the longest prompt's tokens.
    """
    longest = 0
    context = context_length(config)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"Row {number} of the prompts must be a dict with a 'prompt', got {type(row).__name__}.")
        if "prompt" not in row:
            raise ValueError(f"Row {number} has no 'prompt': its columns are {sorted(row)}.")
        if number == 0:
            columns = set(row)
            if rewards is not None:
                rewards.check_columns(set(reward_columns(row)))
        if set(row) != columns:
            raise ValueError(f"Row {number} has the columns {sorted(row)}, but row 0 has {sorted(columns)}.")
        try:
            length = len(encode_prompt(row["prompt"], tokenizer))
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        if context is not None and length + max_new_tokens > context:
            raise ValueError(
                f"Row {number}: the prompt's {length} tokens and generation.max_new_tokens={max_new_tokens} exceed the "
                f"model's context of {context}: shorten the prompt or max_new_tokens, or leave the row out."
            )
        longest = max(longest, length)
    return longest
