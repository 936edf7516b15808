"""Answers as text: what only changes how they look is taken off, and what math-verify would overlook is found."""

import re

MAX_DEPTH = 30  # braces and brackets in each other: parsing more can take seconds

_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*"
_WRAPPED = re.compile(_WORDS + r"\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:quad|qquad|left|right|displaystyle)(?![a-zA-Z])|[$\s]")
_POWER_OF_TEN = re.compile(r"(?<![\w.])([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)[eE]([+-]?\d{1,4})(?!\w)")
_TIDY = (
    (re.compile(r"(?<!\\)~"), " "),  # a space that doesn't break
    (_POWER_OF_TEN, r"\1 \\times 10^{\2}"),  # or its e would be a variable
    (re.compile(r"^([\s$]*)(?:=|≈|\\approx(?![a-zA-Z])|\\sim(?:eq)?(?![a-zA-Z]))"), r"\1"),  # of what stood before
    (re.compile(r"\\mathrm\s*\{\s*([ei])\s*\}"), r" \1"),  # a number, no unit
    (re.compile(r"\\degree(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|[a-zA-Z]))"), r"\\sqrt{\1\2\3}"),
    (re.compile(rf"(?<=\d)\^(?:\{{(?:{_WORDS}\{{)?|{_WORDS}\{{)(?:st|nd|rd|th)\}}{{1,2}}"), ""),  # ordinals
    (re.compile(r"(?<![\s,])[\s,]*\\(?:text|mbox|textrm)\s*\{[\s,]*(?:and|or)\s*\}"), ", "),  # between items
)
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")

# a unit: words after a number, as text or (only of what is compared with a plain number) without
_UNIT_WORD = _WORDS + r"\{[^{}\d]*[a-zA-Z][^{}\d]*\}"
_UNIT_END = rf"(?:{_UNIT_WORD}|\^\{{?-?\d\}}?|_\{{?\\odot\}}?|\\cdot(?![a-zA-Z])|\\[,;:! ]|[\s/.$])*$"
_UNIT_START = r"(?:\\[,;:! ]|[\s]|\^\{?\\circ\}?)*"
_UNIT = re.compile(rf"{_UNIT_START}(?:\\mu\s*)?{_UNIT_WORD}{_UNIT_END}")
_NO_UNIT = r"or|and|if|not|to|mod|plus|minus|times|squared|cubed|dozen|hundred|thousand|[mb]illion|trillion"
_BARE_UNIT = re.compile(
    rf"{_UNIT_START}(?:\\(?:AA|Omega)(?![a-zA-Z])|\\mu(?![a-zA-Z])\s*[a-zA-Z]{{1,2}}|M_\{{?\\odot\}}?"
    rf"|(?<=[\d}}]\s)(?!(?:{_NO_UNIT})\b)(?:[a-zA-Z]{{3,}}|[kcdmnMG][mgsVWJKNALC]|eV|Hz|Pa)(?:/[a-zA-Z]+)?){_UNIT_END}"
)

# words that say more than a unit, and signs that math-verify leaves out together with what follows
_DECISIVE = re.compile(_WORDS + rf"\{{([^{{}}]*(?:\d|\b(?:{_NO_UNIT})\b)[^{{}}]*)\}}")
_OVERLOOKED = re.compile(
    r"^[\s$]*-?[\d.]+\s+[\d.]+[\s$]*$"  # two numbers, which it would multiply
    r"|\d'|\\[bp]?mod(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\[lc]?dots(?![a-zA-Z])"
)
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
_BASE = re.compile(r"\d_\{?(\d+)")
_TUPLE, _SET = re.compile(r"\([^()]*,[^()]*\)"), re.compile(r"\\\{[^()]*\\\}")

# numbers whose digits fill the memory: powers of powers, exponents and factorials beyond any answer's
_SMALL_POWER = re.compile(r"\((?:-?\d{1,4}(?:/\d{1,4})?|-?\\frac\{\d{1,4}\}\{\d{1,4}\})\)\^\{?-?\d{4}(?!\d)\}?")
_RUNAWAY = re.compile(
    r"\^\{*\(?[+-]?\d+\}*\^|(?:\^|\*\*)\{?\(?[+-]?\d{6}|[)\]](?:\^|\*\*)\{?\(?[+-]?\d{4}"
    r"|\^\{[^{}]*\^\{[^{}]*\^|\\[dt]?binom\{(?:\d+\^|\d{6})|\\sqrt\{[^{}]*\^\{?\d{5}|\^\{?\d+\}?!|\d{5}\)?!|\d\)?!\)?!|\d{1000}"
)


def tidy(answer: str) -> str:
    """The answer in the spelling that math-verify reads."""
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    return answer.strip()


def plain(answer: str) -> str:
    """The answer as text to be compared: without what only changes how it looks."""
    text = _WRAPPED.sub(r"\1", _SPACING.sub("", tidy(answer)))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = re.sub(r"^\(([a-zA-Z])\)$", r"\1", text.rstrip("."))  # a choice
    if _THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    return text.lower() if text.isalpha() and text != "E" else text  # e is a number


def has_letters(answer: str) -> bool:
    """Whether there are variables; not in LaTeX commands, nor in words and units."""
    return re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", _WRAPPED.sub("", answer))) is not None


def items(answer: str) -> list[str]:
    """What stands between the commas that are in no brackets, without space."""
    text, depth, found = plain(answer), 0, [""]
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign in ",;" and depth == 0:
            found.append("")
        else:
            found[-1] += sign
    return found


def split_unit(answer: str, *, bare: bool = False) -> tuple[str, str]:
    """A number and its unit, "" where there is none; `bare` also takes units that are not written as text."""
    found = _UNIT.search(answer) or (_BARE_UNIT.search(answer) if bare else None)
    value = answer[: found.start()] if found else ""
    if found is None or has_letters(value) or not re.search(r"\d|\\pi|\\infty", value):
        return answer, ""
    return value + "$" * (value.count("$") % 2), re.sub(r"[{}.]|(?<=[a-z]{3})s$", "", plain(found[0]))


def is_misread(gold: str, answer: str) -> bool:
    """Whether math-verify would overlook in the answer what makes it another one than the right one."""
    right, given = plain(gold), plain(answer)
    if _DECISIVE.findall(gold) != _DECISIVE.findall(answer):
        return True
    if _OVERLOOKED.search(answer) and not _OVERLOOKED.search(gold):
        return True
    if re.search(r"\d:\d", given) and not re.search(r":|/|\\frac", right):
        return True
    based, other = _BASED.fullmatch(right), _BASED.fullmatch(given)  # it leaves the base of a number out
    if _BASE.findall(right) != _BASE.findall(given) or (based and other and based.groups() != other.groups()):
        return True
    if any(_TUPLE.fullmatch(one) and _SET.fullmatch(two) for one, two in ((right, given), (given, right))):
        return True
    lists = items(gold), items(answer)  # it takes them for sets
    repeated = any(len(set(found)) < len(found) for found in lists)
    return repeated and min(map(len, lists)) > 1 and len(lists[0]) != len(lists[1])


def is_runaway(answer: str) -> bool:
    """Whether reading or computing it could take very long."""
    text, depth = _SPACING.sub("", answer), 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth > MAX_DEPTH:
            return True
    return _RUNAWAY.search(_SMALL_POWER.sub("", text)) is not None
