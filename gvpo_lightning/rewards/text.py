"""Rewards that look at the text alone: the right answer, the right form, a length near the limit."""

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from gvpo_lightning.rewards.values import as_text, is_missing

# A minus sign after a digit is a subtraction, or a dash. Commas, in LaTeX's braces or not, only separate thousands.
_NUMBER = re.compile(
    r"(?:(?<!\d)[-−]|(?<![\w%)])–)?(?:(?:\d{1,3}(?:(?:,|\{,\}|,\\!)\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![.\w])\.\d+)"
    r"(?:(?<![a-zA-Z])[eE][+-]?\d{1,4}(?!\w))?"
)


class ExactAnswer:
    """Reward 1.0 where the completion's answer equals the dataset's, else 0.0.

    Args:
        answer_column: the dataset's column with the right answer.
        compare: "text", the whole completion without surrounding white space; or "last_number", the last
            number written in either text, by value (the rule commonly used on GSM8K, whose solutions end in
            "#### 1,234").

    An answer that is a number reads as it was written: 72 also where the column has made 72.0 of it.

    Raises:
        ValueError: when called with a row whose answer is null.
    """

    in_process = True  # it can't hang
    takes_text = True

    def __init__(self, answer_column: str = "answer", compare: Literal["text", "last_number"] = "text") -> None:
        if compare not in ("text", "last_number"):
            raise ValueError(f"ExactAnswer.compare must be 'text' or 'last_number', got {compare!r}.")
        self.answer_column = answer_column
        self.compare = compare
        self.required_columns = [answer_column]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """One reward a completion."""
        answers = columns[self.answer_column]
        return [float(self._matches(c, self._text_of(a))) for c, a in zip(completions, answers, strict=True)]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row whose answer is null."""
        self._text_of(row[self.answer_column])

    def _text_of(self, answer: Any) -> str:
        if is_missing(answer):
            raise ValueError(
                f"ExactAnswer needs a right answer, but {self.answer_column!r} is null: leave the row out."
            )
        return as_text(answer)

    def _matches(self, completion: str, answer: str) -> bool:
        if self.compare == "text":
            return completion.strip() == answer.strip()
        found = _last_number(completion)
        return found is not None and found == _last_number(answer)


def last_number(text: str) -> float | None:
    """The value of the last number written in the text, thousands separators allowed; None if there is none."""
    found = _last_number(text)
    return None if found is None else float(found)


def _last_number(text: str) -> Decimal | None:
    """With all its digits, by which long numbers differ."""
    numbers = _NUMBER.findall(text)
    return Decimal(re.sub(r"[,{}\\!]", "", re.sub("[−–]", "-", numbers[-1]))) if numbers else None


class Format:
    r"""Reward 1.0 where a regular expression matches the completion, else 0.0.

    Args:
        pattern: as in Python's `re`; begin it with `(?s)` for a dot that matches line ends too, as in
            `(?s).*</think>.*\\boxed\{.*\}.*`. A completion does not repeat what its prompt ends with, such as the
            `<think>` of the prompt template `r1`.
        full_match: it must match the whole completion; otherwise somewhere in it.
        name: in metrics.

    Raises:
        ValueError: the pattern is no regular expression.
    """

    takes_text = True

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
    takes_text = True

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
