r"""Answers made of right ones: written otherwise, and so still right, or changed, and so wrong.

What a number is worth is worked out here, in fractions and without the grader. The kinds, each in both directions:

* juxtaposition: 14 is `2(7)` and not `1(13)`, which is 14 to whoever adds; `\frac52` is not `2\left(\frac12\right)`;
* mixed: `\frac52` is `2\frac12` and `2 1/2`, 5 is not `5\frac12`;
* percent: `\frac18` is `12\frac12\%` and not `125\%`;
* thousands: 1234 is `1{,}234` and `1 234`, 5 is not `5,000`;
* sign: −5, with any sign that looks like a minus, is -5 and not 5;
* letters: those of a product have no order; those of a word have one, and case does not count.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

Answers = dict[str, str]  # by kind and number
Worth = Fraction | bool | None  # of a number; or whether an answer is still right; None: it is no number any more
Written = Iterator[tuple[str, Worth]]

_DECIMAL = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)")
_FRACTION = re.compile(r"(-?)(?:\\[dt]?frac(?:\{(\d+)\}|(\d))(?:\{(\d+)\}|(\d))|(\d+)/(\d+))")
_WORD = re.compile(r"(?:\\text\{)?([a-zA-Z]{2,})\}?")
_SEVERAL = re.compile(r"[=<>,;\[\]]|\\(?:pm|cup|le|ge|geqslant|in|begin)(?![a-zA-Z])|\\text|\\mbox")
_PRODUCT = re.compile(r"(?<![a-zA-Z\\{])(?!d)[a-zA-Z]{2}(?![a-zA-Z^_('!])")  # two letters that are multiplied
_FULL_WIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
_MINUSES = "-−－–"
# around a formula: its kind, and the number that it is multiplied by
_AROUND = (
    ("juxtaposition", r"(1)\left(%s\right)", 1),
    ("juxtaposition", r"\frac{2(%s)}{2}", 1),
    ("juxtaposition", r"3(1/3)\left(%s\right)", 1),
    ("juxtaposition", "2(%s)", 2),
    ("juxtaposition", r"\frac{3(%s)}{2}", 1.5),
    ("juxtaposition", r"1(1/2)\left(%s\right)", 0.5),
    ("mixed", r"\frac23 \cdot 1\frac12\left(%s\right)", 1),
    ("mixed", r"1 1/2(%s)\frac23", 1),
    ("mixed", r"1\frac12\left(%s\right)", 1.5),
    ("mixed", r"2 \cdot 1\frac12\left(%s\right)", 3),
    ("percent", r"100\%% \cdot (%s)", 1),
    ("percent", r"12\frac12\%% (8)(%s)", 1),
    ("percent", r"10\%% \cdot (%s)", 0.1),
    ("percent", r"12\frac12\%% (%s)", 0.125),
    ("sign", "−(−(%s))", 1),
    *(("sign", minus + "(%s)", -1) for minus in _MINUSES[1:]),
)


def value_of(answer: str) -> Fraction | None:
    """What a plain number or fraction is worth; None of anything else."""
    text = re.sub(r"[{]?,[}]?(?=\d{3}(?!\d))", "", re.sub(r"\\[!,]|[$\s]", "", answer))
    if _DECIMAL.fullmatch(text):
        return Fraction(text)
    if found := _FRACTION.fullmatch(text):
        top, bottom = (int(part) for part in found.groups()[1:] if part)
        return Fraction(top, bottom) * (-1 if found[1] else 1)
    return None


def word_of(answer: str) -> str | None:
    """The word that an answer consists of, without what is around it."""
    found = _WORD.fullmatch(answer.strip("$ "))
    return found[1] if found else None


def is_formula(answer: str) -> bool:
    """Whether it is a single value other than 0, with letters or not, and no word."""
    letters = re.sub(r"\\[a-zA-Z]+", "x", answer)
    return bool(
        not _SEVERAL.search(answer) and re.search(r"[1-9a-zA-Z]", letters) and not re.search(r"[a-zA-Z]{3}", letters)
    )


def rewritten(alternatives: Sequence[str]) -> Answers:
    """The first of the right answers, written otherwise."""
    right = value_of(alternatives[0])
    return _named(
        (kind, text)
        for kind, text, worth in _all(alternatives[0])
        if worth is True or (right is not None and worth == right)
    )


def changed(alternatives: Sequence[str]) -> Answers:
    """Answers that look like the first of the right ones, and are worth something else than any of them."""
    right = [value_of(text) for text in alternatives if value_of(text) is not None]
    return _named(
        (kind, text) for kind, text, worth in _all(alternatives[0]) if worth is not True and worth not in right
    )


def _named(found: Iterator[tuple[str, str]]) -> Answers:
    return {f"{kind} {number}": text for number, (kind, text) in enumerate(dict.fromkeys(found))}


def _all(answer: str) -> Iterator[tuple[str, str, Worth]]:
    value = value_of(answer)
    if value is not None:
        for kind, make in NUMBERS.items():
            yield from ((kind, text, worth) for text, worth in make(value))
    elif word := word_of(answer):
        yield from (("letters", text, worth) for text, worth in _words(word))
    elif is_formula(formula := answer.strip("$ ")):
        yield from ((kind, text % formula, factor == 1) for kind, text, factor in _AROUND)
        if product := _PRODUCT.search(formula):
            yield "letters", formula[: product.start()] + product[0][::-1] + formula[product.end() :], True


def _words(word: str) -> Written:
    for text in (word.upper(), word.lower(), rf"\text{{{word}}}", rf"\text{{ {word.title()} }}", rf"\mathrm{{{word}}}"):
        yield text, True
    for letters in (word[::-1], word[1:] + word[0], word[1] + word[0] + word[2:]):
        if letters.lower() != word.lower():
            yield letters, False
            yield rf"\text{{{letters}}}", False


def _juxtaposition(value: Fraction) -> Written:
    minus, sign, size = "-" * (value < 0), -1 if value < 0 else 1, abs(value)
    top, bottom = size.numerator, size.denominator
    factor = next((p for p in (2, 3, 5, 7, 11, 13) if top % p == 0 and top), 1)
    rest = _fraction(size / factor)
    for text in (
        f"{factor}({rest})",
        f"({factor})({rest})",
        rf"{factor}\left({rest}\right)",
        rf"{factor} \cdot {rest}",
    ):
        yield minus + text, value
    for text in (
        rf"\frac{{{2 * top}(3)}}{{{6 * bottom}}}",
        rf"{top}\binom{{2}}{{2}}(1/{bottom})",
        f"[{top}][1/{bottom}]",
    ):
        yield minus + text, value
    if bottom > 1 or top < 2:
        return
    for one in (1, 2):  # whose sum would be right
        other = top - one
        for text in (f"{one}({other})", f"({one})({other})", rf"{one}\left({other}\right)", f"{{{one}}}{{{other}}}"):
            yield minus + text, sign * Fraction(one * other)
        yield rf"{minus}{one}\binom{{{other}}}{{1}}", sign * Fraction(one * other)
        yield rf"{minus}\frac{{{one}({other})}}{{1}}", sign * Fraction(one * other)
        yield f"{minus}{one} {other}", None
    digits = str(top)
    yield f"{minus}{digits[:1]} {digits[1:]}" if len(digits) in (2, 3) else f"{minus}{digits} 0", None


def _mixed_number(value: Fraction) -> Written:
    minus, sign, size = "-" * (value < 0), -1 if value < 0 else 1, abs(value)
    whole, part = divmod(size.numerator, size.denominator)
    bottom = size.denominator
    proper = rf"\frac{{{part}}}{{{bottom}}}"
    if not part:
        for half in (r"\frac12", r"\frac{1}{2}", " 1/2", r" \tfrac{1}{2}", "½"):
            yield f"{minus}{whole}{half}", sign * (size + Fraction(1, 2))
        return
    yield f"{minus}{whole + 1}{proper}", sign * (size + 1)
    yield f"{minus}{whole + 1} {part}/{bottom}", sign * (size + 1)
    if not whole:
        return
    for space in ("", " ", r"\,", "~"):
        yield f"{minus}{whole}{space}{proper}", value
    yield f"{minus}{whole} {part}/{bottom}", value
    yield rf"{minus}{whole}\dfrac{{{part}}}{{{bottom}}}", value
    yield rf"{minus}\left({whole}\tfrac{{{part}}}{{{bottom}}}\right)", value
    other = Fraction(part + 1, bottom + 1)
    yield rf"{minus}{whole}\frac{{{part + 1}}}{{{bottom + 1}}}", sign * (whole + other)
    product = sign * whole * Fraction(part, bottom)
    for text in (rf"{whole}\left({proper}\right)", f"{whole}({part}/{bottom})", f"({whole}){proper}"):
        yield minus + text, product
    yield rf"{minus}{whole} \cdot {proper}", product


def _percent(value: Fraction) -> Written:
    minus, size = "-" * (value < 0), abs(value)
    for percent in (r"\%", "%", r" \%", r"\text{ percent}"):
        for factor in (1, Fraction(1, 10), 10, Fraction(1, 1000)):
            yield f"{minus}{_mixed(size * 100 * factor)}{percent}", value * factor
            yield f"{minus}{_fraction(size * 100 * factor)}{percent}", value * factor


def _thousands(value: Fraction) -> Written:
    minus, sign, top = "-" * (value < 0), -1 if value < 0 else 1, abs(value.numerator)
    if value.denominator > 1:
        return
    yield minus + str(top).translate(_FULL_WIDTH), value
    for comma in (",", "{,}", r",\!", r"\,", " ", "~"):
        if top >= 1000:
            yield minus + f"{top:,}".replace(",", comma), value
        yield f"{minus}{top % 1000}{comma}000", sign * Fraction(top % 1000 * 1000)
        yield f"{minus}{top}{comma}001", sign * Fraction(top * 1000 + 1) if 0 < top < 1000 else None


def _sign(value: Fraction) -> Written:
    size = _fraction(abs(value))
    for minus in _MINUSES:
        yield f"{minus}{size}", -abs(value)
        yield f"{minus} {size}", -abs(value)
    yield size, abs(value)
    yield f"+{size}", abs(value)
    yield f"0-{size}", -abs(value)
    yield f"-({_fraction(value)})", -value
    yield f"-({_fraction(-value)})", value


NUMBERS: dict[str, Callable[[Fraction], Written]] = {
    "juxtaposition": _juxtaposition,
    "mixed": _mixed_number,
    "percent": _percent,
    "thousands": _thousands,
    "sign": _sign,
}
KINDS = (*NUMBERS, "letters")


def _fraction(value: Fraction) -> str:
    minus, size = "-" * (value < 0), abs(value)
    return f"{minus}{size}" if size.denominator == 1 else rf"{minus}\frac{{{size.numerator}}}{{{size.denominator}}}"


def _mixed(value: Fraction) -> str:
    whole, part = divmod(value.numerator, value.denominator)
    if not whole or not part:
        return _fraction(value)
    return rf"{whole}\frac{{{part}}}{{{value.denominator}}}"
