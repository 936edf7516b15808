"""1 for a completion of the right form, 0 for any other."""

import re
from collections.abc import Sequence
from typing import Any


class Format:
    r"""Reward 1.0 where a regular expression matches the completion, else 0.0.

    Args:
        pattern: as in Python's `re`; begin it with `(?s)` for a dot that matches line ends too, as in
            `(?s)<think>.*</think>.*\\boxed\{.*\}.*`.
        full_match: it must match the whole completion; otherwise somewhere in it.
        name: in metrics.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    def __init__(self, pattern: str, full_match: bool = True, name: str = "Format") -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"Format.pattern must be a regular expression, got {pattern!r}: {error}.") from error
        self.full_match = full_match
        self.name = name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """One reward a completion."""
        matches = self.pattern.fullmatch if self.full_match else self.pattern.search
        return [float(matches(completion) is not None) for completion in completions]
