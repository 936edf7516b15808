"""Rewards of the tasks: 1.0 for a right completion, 0.0 for any other text."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

OPERATORS = "+-*"
_EXPRESSION = re.compile(r"[1-9][0-9]*(?:[+*-][1-9][0-9]*)*")
_LAST_NUMBER = re.compile(r"[0-9]+\Z")


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    numbers: Sequence[list[int]],
    target: Sequence[int],
    **columns: Sequence[Any],
) -> list[float]:
    """1.0 for an expression that uses each of `numbers` once and equals `target`."""
    rows = zip(completions, numbers, target, strict=True)
    return [float(_is_right(completion, row_numbers, row_target)) for completion, row_numbers, row_target in rows]


def chain_answer(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence[Any]
) -> list[float]:
    """1.0 where the number that the completion ends in is written as `answer`."""
    found = [_LAST_NUMBER.search(completion) for completion in completions]
    return [float(match is not None and match[0] == right) for match, right in zip(found, answer, strict=True)]


def right_answers(row: Mapping[str, Any]) -> list[str]:
    """All completions of a row of countdown that are right."""
    return [text for text in expressions(row["numbers"]) if evaluate(text) == row["target"]]


def expressions(numbers: Sequence[int]) -> list[str]:
    """Every way to write the numbers once each with operators between them, without repeats."""
    found = {
        "".join(itertools.chain.from_iterable(zip(map(str, order), (*operators, ""), strict=True)))
        for order in itertools.permutations(numbers)
        for operators in itertools.product(OPERATORS, repeat=len(numbers) - 1)
    }
    return sorted(found)


def evaluate(text: str) -> int | None:
    """The value of whole numbers joined by + - *, which binds closest; None for any other text."""
    if not _EXPRESSION.fullmatch(text):
        return None
    total = 0
    for sign, product in re.findall(r"([+-]?)([0-9*]+)", text):
        value = 1
        for factor in product.split("*"):
            value *= int(factor)
        total += -value if sign == "-" else value
    return total


def _is_right(text: str, numbers: Sequence[int], target: int) -> bool:
    used = sorted(re.findall(r"[0-9]+", text))
    return used == sorted(map(str, numbers)) and evaluate(text) == target
