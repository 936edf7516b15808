"""Boxed answers to mathematical problems, compared as mathematics with math-verify."""

import ast
import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

MAX_ANSWER = 1000  # characters: nothing longer is an answer, and parsing it could take minutes
TAIL = 1000  # characters at the end of a completion in which an answer without a box is looked for
DIGITS = 6  # decimals that numbers written with a decimal point are compared to; digits where they are below 1

_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:quad|qquad|left|right|displaystyle)(?![a-zA-Z])|[$\s]|~")
_POWER_OF_TEN = re.compile(r"(?<![\w.])([+-]?\d+\.?\d*|[+-]?\.\d+)[eE]([+-]?\d{1,4})(?!\w)")
_BRACES = re.compile(r"\\boxed\s*\{|\\boxed\s+(?P<bare>[^\s${}\\.,]+)|\\.|[{}]", re.DOTALL)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
# what math-verify reads as a function, as e, or not at all, by a name that it takes for a variable
_RENAMED = (
    (_POWER_OF_TEN, r"\1 \\times 10^{\2}"),
    (re.compile(r"\\gamma(?![a-zA-Z])"), "g_{amma}"),
    (re.compile(r"(?<![a-zA-Z\\])E_"), r"\\mathcal{E}_"),
    (re.compile(r"_\{\\([a-zA-Z]+)\s*\}"), r"_{\1}"),
)
# numbers whose digits fill the memory: powers of powers, exponents and factorials beyond any answer's
_RUNAWAY = re.compile(r"\^\{*\(?[+-]?\d+\}?\^|(?:\^|\*\*)\{?\(?[+-]?\d{6}|\d{5}\)?!|\d\)?!\)?!|\d{1000}")


class BoxedMath:
    r"""Reward 1.0 where the completion's answer equals the dataset's, else 0.0.

    The answer is what stands in the last `\boxed{…}`, after `<answer>` where that occurs (R1's form; there a box is
    not needed). Numbers, formulas, sets, intervals, matrices and words are compared by value with math-verify, so
    `\frac12`, `0.5` and `1/2` are one answer; math-verify's own timeouts, which need the main thread, are off.

    Args:
        answer_column: the dataset's column with the right answer: a number, a text, or a list of alternatives, of
            which any one is right, also as text that spells a Python list, such as "['9.6', '9.60']".
        require_box: False also takes an answer that is not boxed from the end of the completion, as math-verify
            finds it.

    Raises:
        ValueError: when called with a row that has no right answer.
    """

    def __init__(self, answer_column: str = "answer", require_box: bool = True) -> None:
        self.answer_column = answer_column
        self.require_box = require_box
        self.extract_answer = extract_answer if require_box else None  # for maj@k; math-verify's search could hang
        self.required_columns = [answer_column]

    def warm_up(self) -> None:
        """Import what is needed: seconds that are no completion's."""
        same_answer("1/2", "0.5")

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        """One reward a completion."""
        rewards = []
        for row, (completion, gold) in enumerate(zip(completions, columns[self.answer_column], strict=True)):
            try:
                alternatives = gold_answers(gold)
            except ValueError as error:
                raise ValueError(f"{self.answer_column!r} of row {row}: {error}") from error
            answer = extract_answer(completion, require_box=self.require_box)
            rewards.append(float(answer is not None and any(same_answer(right, answer) for right in alternatives)))
        return rewards


def gold_answers(gold: Any) -> list[str]:
    """The alternatives of a right answer as a dataset has it: text, a number, or a list of them, maybe spelt out.

    Raises:
        ValueError: there is none.
    """
    if isinstance(gold, str) and gold.lstrip().startswith("['"):
        with contextlib.suppress(SyntaxError, ValueError):  # mathematics that begins like a Python list
            gold = ast.literal_eval(gold.strip())
    values = list(gold) if isinstance(gold, (list, tuple)) else [gold]
    if isinstance(gold, float) and gold.is_integer():
        values = [int(gold)]
    texts = [str(value).strip() for value in values if value is not None]
    if not any(texts):
        raise ValueError(f"a right answer is needed, got {gold!r}.")
    return [text for text in texts if text]


def extract_answer(completion: str, *, require_box: bool = True) -> str | None:
    """What a completion gives as its answer, as written; None where it gives none."""
    _, tag, tagged = completion.rpartition("<answer>")
    text = tagged.partition("</answer>")[0] if tag else completion
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    if tag:
        return text.strip() or None
    if require_box:
        return None
    found = _parse(text[-TAIL:], drop_units=True, is_boxed=False)
    return next((part for part in found if isinstance(part, str)), None)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` that is closed, without space around it; `\boxed 5` counts too."""
    open_braces: list[re.Match[str]] = []
    last, content = -1, None
    for token in _BRACES.finditer(text):
        if token["bare"]:
            last, content = token.start(), token["bare"]
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opening = open_braces.pop()
            if opening[0] != "{" and opening.start() > last:
                last, content = opening.start(), text[opening.end() : token.start()].strip()
    return content


def plain(answer: str) -> str:
    """The answer as text to be compared: without what only changes how it looks."""
    text = _POWER_OF_TEN.sub(r"\1\\times10^{\2}", answer)
    text = _WRAPPED.sub(r"\1", _SPACING.sub("", text))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = text.rstrip(".")
    if _THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    return text.lower() if text.isalpha() else text


def same_answer(gold: str, answer: str) -> bool:
    """Whether an answer is the right one; never raises, whatever the answer is."""
    if len(answer) > MAX_ANSWER:
        return False
    if plain(gold) == plain(answer):
        return True
    if _RUNAWAY.search(answer.replace(" ", "")) or _other_base(gold, answer):
        return False
    return any(_same_value(right, answer) for right in _with_and_without_percent(gold))


def is_readable(answer: str) -> bool:
    """Whether math-verify can read it as mathematics; else it equals only what is written in the same way."""
    return any(not isinstance(part, str) for part in _parse_answer(answer, not _has_letters(answer)))


def _has_letters(answer: str) -> bool:
    """Whether there are variables; not in LaTeX commands, nor in words and units."""
    return re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", _WRAPPED.sub("", answer))) is not None


def _other_base(gold: str, answer: str) -> bool:
    """Numbers in other bases are no mathematics to math-verify, which leaves the subscript out."""
    right, given = _BASED.fullmatch(plain(gold)), _BASED.fullmatch(plain(answer))
    return right is not None and given is not None and right.groups() != given.groups()


def _with_and_without_percent(gold: str) -> Iterator[str]:
    """62.5% may be answered as 62.5 too."""
    yield gold
    if (without := re.sub(r"\\?%", "", gold)) != gold:
        yield without


def _same_value(gold: str, answer: str) -> bool:
    from math_verify import verify

    drop_units = not _has_letters(gold)  # or a variable such as c would be taken for a unit
    right, given = _parse_answer(gold, drop_units), _parse_answer(answer, drop_units)
    for left in right:
        for other in given:
            verdict = _same_number(left, other)
            verdict = _same_equation(left, other) if verdict is None else verdict
            if verdict is not None:
                return verdict
    return bool(verify(list(right), list(given), float_rounding=DIGITS, timeout_seconds=None))


def _same_number(gold: Any, answer: Any) -> bool | None:
    """Whether two real numbers are equal, to `DIGITS` where one has a decimal point; None where not both are numbers.

    math-verify takes numbers below 1e-6 for 0.
    """
    from sympy import Float, N, Rational

    if isinstance(gold, str) or isinstance(answer, str):
        return None
    try:
        if not (gold.is_number and answer.is_number and gold.is_real and answer.is_real):
            return None
        left, right = gold.doit(), answer.doit()
        if isinstance(left, Rational) and isinstance(right, Rational) and not (gold.has(Float) or answer.has(Float)):
            return bool(left == right)
        left, right = N(left, 40), N(right, 40)
        scale = max(abs(left), abs(right))
        if gold.has(Float) or answer.has(Float):
            tolerance = 0.5 * 10**-DIGITS * min(1, 10 * scale)
            return bool(abs(left - right) <= max(tolerance, 1e-14 * scale))
        return bool(abs(left - right) <= scale * Rational(1, 10**30))
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return None


def _same_equation(gold: Any, answer: Any) -> bool | None:
    """Whether one is a multiple of the other; None where not both are equations.

    math-verify would solve them, which can take minutes and finds equations equal that it can't solve.
    """
    from sympy import Derivative, Eq, Symbol, simplify

    if not isinstance(gold, Eq) or not isinstance(answer, Eq):
        return None
    try:
        # derivatives by name: sympy takes variables for constants, whose derivatives are 0
        left, right = (
            (side.lhs - side.rhs).replace(lambda part: isinstance(part, Derivative), lambda part: Symbol(str(part)))
            for side in (gold, answer)
        )
        ratio = simplify(left / right)
        return bool(ratio.is_number and ratio.is_finite and ratio.is_zero is False)
    except (AttributeError, TypeError, ValueError, NotImplementedError, RecursionError):
        return None


@lru_cache(maxsize=4096)
def _parse_answer(answer: str, drop_units: bool) -> tuple[Any, ...]:
    for pattern, replacement in _RENAMED:
        answer = pattern.sub(replacement, answer)
    return tuple(_parse("\\boxed{" + answer + "}", drop_units=drop_units, is_boxed=True))


def _parse(text: str, *, drop_units: bool, is_boxed: bool) -> list[Any]:
    """What math-verify makes of a text: an expression where it can, and the text that it found."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    cleaning = NormalizationConfig(
        basic_latex=True, units=drop_units, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    targets: list[Any] = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=cleaning)]
    if not is_boxed:  # it would take a part of a formula for the whole
        targets.append(ExprExtractionConfig())
    try:
        return parse(text, targets, parsing_timeout=None)
    except RecursionError:
        return []
