"""1 for the right answer, 0 for anything else."""

import re
from collections.abc import Sequence
from typing import Any, Literal

# a minus sign after a digit is a subtraction; commas only where they separate thousands
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![.\w])\.\d+)")


class ExactAnswer:
    """Reward 1.0 where the completion's answer equals the dataset's, else 0.0.

    Args:
        answer_column: the dataset's column with the right answer.
        compare: "text", the whole completion without surrounding white space; or "last_number", the last
            number written in either text, by value (the rule commonly used on GSM8K, whose solutions end in
            "#### 1,234").
    """

    in_process = True  # it can't hang

    def __init__(self, answer_column: str = "answer", compare: Literal["text", "last_number"] = "text") -> None:
        if compare not in ("text", "last_number"):
            raise ValueError(f"ExactAnswer.compare must be 'text' or 'last_number', got {compare!r}.")
        self.answer_column = answer_column
        self.compare = compare
        self.required_columns = [answer_column]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """One reward a completion."""
        answers = columns[self.answer_column]
        return [float(self._matches(c, str(a))) for c, a in zip(completions, answers, strict=True)]

    def _matches(self, completion: str, answer: str) -> bool:
        if self.compare == "text":
            return completion.strip() == answer.strip()
        found = last_number(completion)
        return found is not None and found == last_number(answer)


def last_number(text: str) -> float | None:
    """The value of the last number written in the text, thousands separators allowed; None if there is none."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
