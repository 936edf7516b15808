"""Boxed answers to mathematical problems, compared as mathematics with math-verify."""

import ast
import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from gvpo_lightning.rewards.answer_text import (
    has_letters,
    is_misread,
    is_runaway,
    items,
    matched,
    plain,
    split_unit,
    tidy,
)
from gvpo_lightning.rewards.side_by_side import Unclear, spell_out
from gvpo_lightning.rewards.values import as_text, is_missing

MAX_ANSWER = 1000  # characters: nothing longer is an answer, and parsing it could take minutes
TAIL = 1000  # characters at the end of a completion in which an answer without a box is looked for
DIGITS = 6  # decimals that numbers written with a decimal point are compared to; digits where they are below 1

# a box without braces holds a number or word, or one command with its arguments
_ARGUMENT = r"\s*(?:\{[^{}]*\}|\d)"
_BARE = (
    rf"-?\\(?:[dtc]?frac{_ARGUMENT}{_ARGUMENT}|(?:sqrt|text|textbf|mathrm|mathbf){_ARGUMENT}|pi(?![a-zA-Z]))"
    r"|(?<=\s)(?:[^\s${}\\.,]|[.,](?=\d))+"
)
_BRACES = re.compile(rf"\\(?:boxed|fbox)(?:\s*\{{|\s*(?P<bare>{_BARE}))|\\.|[{{}}]", re.DOTALL)
_EMPTY = re.compile(r"(?:\\[,;:! ]|\\(?:boxed|fbox|q?quad|[lc]?dots)|[\s${}.~…]){,50}")
_APPROXIMATE = re.compile(r"\\approx(?![a-zA-Z])|\\sim(?:eq)?(?![a-zA-Z])|≈")
_EQUALITY = re.compile(r"(?<![<>!:])=|" + _APPROXIMATE.pattern)
_DECIMAL = re.compile(r"-?(\d+(?:\.(\d+))?)(?:\\(?:times|cdot)10\^\{?-?\d+\}?)?$")
# names, behind which letters stand once the space between has been taken off
_NAME = re.compile(
    r"\\(?:alpha|beta|gamma|delta|(?:var)?epsilon|zeta|eta|(?:var)?theta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|upsilon"
    r"|(?:var)?phi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell|angle|triangle|overline|vec)"
)
# what math-verify reads as a function, as e, or not at all, by a name that it takes for a variable
_RENAMED = (
    (re.compile(r"\\gamma(?![a-zA-Z])"), "g_{amma}"),
    (re.compile(r"(?<![a-zA-Z\\])(?<!\\text\{)(?<!\\text\{\()E(?![a-zA-Z])"), r"\\mathcal{E}"),
    (re.compile(r"_\{\\([a-zA-Z]+)\s*\}"), r"_{\1}"),
)


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

    takes_text = True

    def __init__(self, answer_column: str = "answer", require_box: bool = True) -> None:
        self.answer_column = answer_column
        self.require_box = require_box
        self.extract_answer = extract_answer if require_box else None  # for maj@k; math-verify's search could hang
        self.required_columns = [answer_column]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Raise ValueError for a row that has no right answer."""
        try:
            gold_answers(row[self.answer_column])
        except ValueError as error:
            raise ValueError(f"BoxedMath, {self.answer_column!r}: {error} Leave the row out.") from error

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
    if isinstance(gold, str) and gold.lstrip().startswith(("['", '["')):
        with contextlib.suppress(SyntaxError, ValueError):  # mathematics that begins like a Python list
            gold = ast.literal_eval(gold.strip())
    values = list(gold) if isinstance(gold, (list, tuple)) else [gold]
    texts = [as_text(value).strip() for value in values if not is_missing(value)]
    if not any(texts):
        raise ValueError(f"a right answer is needed, got {gold!r}.")
    return [text for text in texts if text]


def extract_answer(completion: str, *, require_box: bool = True) -> str | None:
    """What a completion gives as its answer, as written; None where it gives none."""
    _, _, tagged = completion.rpartition("<answer>") if "<answer>" in completion else ("", "", "")
    tagged, closed, _ = tagged.partition("</answer>")
    answer = last_boxed(tagged)
    if answer is None and not (closed and tagged.strip()):  # else the tag is only mentioned, or not closed
        answer = last_boxed(completion)
    if answer is None:
        answer = tagged.strip() or None
    if answer is not None or require_box:
        return answer
    found = _parse(completion[-TAIL:], is_boxed=False)
    return next((part for part in found if isinstance(part, str)), None)


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}` that is closed and not empty, without space around it.

    `\boxed 5` and `\boxed\frac12` count too.
    """
    open_braces: list[re.Match[str]] = []
    last, content = -1, None
    for token in _BRACES.finditer(text):
        if token["bare"]:
            last, content = token.start(), token["bare"]
        elif token[0].endswith("{") and token[0] != "\\{":
            open_braces.append(token)
        elif token[0] == "}" and open_braces:
            opening = open_braces.pop()
            inside = text[opening.end() : token.start()].strip()
            if opening[0] != "{" and opening.start() > last and not _EMPTY.fullmatch(inside):
                last, content = opening.start(), inside
    return content


def same_answer(gold: str, answer: str) -> bool:
    """Whether an answer is the right one; never raises, whatever the answer is."""
    if len(answer) > MAX_ANSWER:
        return False
    if plain(gold) == plain(answer):
        return True
    gold, answer = matched(tidy(gold), tidy(answer))
    if is_runaway(answer) or is_misread(gold, answer):
        return False
    gold, unit = split_unit(gold)
    is_number = not has_letters(gold) and not re.search(r"\\(?:mu|Omega|AA|text|mathrm|mbox)", gold)
    if unit or is_number:
        answer, other = split_unit(answer, bare=True)
        if unit and other and unit != other:
            return False
    stated = _stated(answer, gold)
    if stated is None:
        return False
    if ("%" in gold) != ("%" in stated) and _same_value(re.sub(r"\\?%", "", gold), re.sub(r"\\?%", "", stated)):
        return True  # 62.5% may be answered as 62.5 too
    return _same_value(gold, stated)


def is_readable(answer: str) -> bool:
    """Whether math-verify can read it as mathematics; else it equals only what is written in the same way."""
    answer = tidy(answer)
    return any(not isinstance(part, str) for part in _parse_answer(answer))


def _stated(answer: str, gold: str) -> str | None:
    """What an answer such as `x = 2/3 = 0.67` states: a number of it where there are several; None if they differ.

    math-verify would take one of them and overlook the others.
    """
    stated = answer
    for item in items(answer):
        sides = _EQUALITY.split(item)
        numbers = [side for side in sides if side and not has_letters(side) and not _NAME.search(side)]
        if not all(_same_value(one, two) or _is_rounded(one, two) for one, two in pairwise(numbers)):
            return None
        if len(items(answer)) == 1 and (len(numbers) > 1 or _APPROXIMATE.search(item)) and "=" not in gold:
            sides = numbers if numbers and not has_letters(gold) else sides
            stated = sides[-1] if re.search(r"\.\d", gold) else sides[0]
    return stated


def _is_rounded(exact: str, decimal: str) -> bool:
    """Whether a number written with decimals, maybe times a power of ten, is the other one rounded."""
    digits = _DECIMAL.match(decimal)
    values = [part for text in (exact, decimal) for part in _parse_answer(text)[:1] if not isinstance(part, str)]
    if digits is None or len(values) < 2 or not float(digits[1]):
        return False
    try:
        left, right = (float(value.evalf()) for value in values)
        half = 0.5 * 10.0 ** -len(digits[2] or "") * abs(right / float(digits[1]))
        return abs(left - right) <= half * (1 + 1e-9)
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError):
        return False


def _same_value(gold: str, answer: str) -> bool:
    from math_verify import verify
    from sympy.core.random import seed

    seed(0)  # sympy tries random numbers; an answer must not depend on those that were graded before
    right, given = _parse_answer(gold), _parse_answer(answer)
    for left in right:
        for other in given:
            verdict = _same_number(left, other)
            verdict = _same_equation(left, other) if verdict is None else verdict
            if verdict is not None:
                return verdict
    return bool(verify(list(right), list(given), float_rounding=DIGITS, timeout_seconds=None))


def _same_number(gold: Any, answer: Any) -> bool | None:
    """Whether two numbers are equal, to `DIGITS` where one has a decimal point; None where not both are numbers.

    math-verify takes numbers below 1e-6 for 0.
    """
    from sympy import Expr, Float, Limit, N, Rational, nan, oo, simplify, zoo
    from sympy.concrete.expr_with_limits import ExprWithLimits

    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return None
    try:
        left, right = gold.doit(), answer.doit()
        if any(value.has(oo, -oo, zoo, nan) and not value.has(ExprWithLimits, Limit) for value in (gold, answer)):
            # a difference of infinities is 0 to sympy or not, as its random numbers want
            return bool(left == right and left in (oo, -oo))
        is_one = gold.is_Symbol != answer.is_Symbol and left.free_symbols == right.free_symbols
        if is_one and simplify(left - right) == 0:
            return True  # math-verify takes products for the symbol's name alone
        if not (gold.is_number and answer.is_number):
            return None
        if isinstance(left, Rational) and isinstance(right, Rational) and not (gold.has(Float) or answer.has(Float)):
            return bool(left == right)
        left, right = N(left, 40), N(right, 40)
        if not (left.is_finite and right.is_finite):
            return bool(left == right and left in (oo, -oo))
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
def _parse_answer(answer: str) -> tuple[Any, ...]:
    try:
        answer = spell_out(answer)
    except (Unclear, RecursionError):
        return ()
    for pattern, replacement in _RENAMED:
        answer = pattern.sub(replacement, answer)
    return tuple(_parse("\\boxed{" + answer + "}", is_boxed=True))


def _parse(text: str, *, is_boxed: bool) -> list[Any]:
    """What math-verify makes of a text: an expression where it can, and the text that it found."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its timeouts are off
    cleaning = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    # within a box it would take a part of what it can't read for the whole
    targets: list[Any] = [
        LatexExtractionConfig(
            try_extract_without_anchor=not is_boxed, boxed_match_priority=0, normalization_config=cleaning
        )
    ]
    if not is_boxed:
        targets.append(ExprExtractionConfig())
    try:
        return parse(text, targets, parsing_timeout=None)
    except RecursionError:
        return []
