"""What must hold of prompts before any of them is trained or evaluated on."""

from collections.abc import Iterable

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from gvpo_lightning.rewards import Reward, check_reward_columns
from gvpo_lightning.rollout.generation import encode_prompt
from gvpo_lightning.rollout.loader import Row


def check_prompts(
    rows: Iterable[Row],
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    reward: Reward,
    max_new_tokens: int,
) -> None:
    """Raise ValueError, naming the row, for prompts that a policy with this config can't be given.

    That is: no `prompt`, a prompt that is neither text nor messages, no room for max_new_tokens in the
    model's context, or rows without the columns that the reward needs.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"Row {number} has no 'prompt': its columns are {sorted(row)}.")
        if number == 0:
            columns = set(row)
            check_reward_columns(reward, columns - {"prompt"})
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
