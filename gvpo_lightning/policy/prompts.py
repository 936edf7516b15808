"""A prompt's token ids."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


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
