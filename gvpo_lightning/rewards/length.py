"""A penalty on completions that come near the token limit."""

from collections.abc import Sequence
from typing import Any


class LengthPenalty:
    """0 up to `max_tokens - buffer_tokens`, from there linearly down to -1 at `max_tokens`, and -1 beyond.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), to be added to a reward for the answer.

    Args:
        max_tokens: usually `generation.max_new_tokens`; the end token counts.
        buffer_tokens: how many tokens before that the penalty begins.
        name: in metrics.

    Raises:
        ValueError: a buffer that is not within 1 to `max_tokens`.
    """

    in_process = True  # it can't hang

    def __init__(self, max_tokens: int, buffer_tokens: int, name: str = "LengthPenalty") -> None:
        if not 1 <= buffer_tokens <= max_tokens:
            raise ValueError(
                f"LengthPenalty.buffer_tokens must be from 1 to max_tokens={max_tokens}, got {buffer_tokens}."
            )
        self.max_tokens, self.buffer_tokens = max_tokens, buffer_tokens
        self.name = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[Any],
    ) -> list[float]:
        """One reward a completion."""
        return [min(0.0, max(-1.0, (self.max_tokens - len(ids)) / self.buffer_tokens - 1.0)) for ids in completion_ids]
