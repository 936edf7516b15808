"""Answers as text: what only changes how they look is taken off, and what math-verify would overlook is found."""

import re
import unicodedata

MAX_DEPTH = 30  # braces and brackets in each other: parsing more can take seconds

# Signs that a keyboard has otherwise, or that LaTeX has commands for.
_SIGNS = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # of full width
_SIGNS |= dict.fromkeys("−‐‑﹣", "-") | {"、": ",", "。": ".", "\u200b": ""}
_SIGNS |= {sign: rf"^{{{power}}}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
_SIGNS |= {
    sign: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", sign).split("⁄")) for sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
}
_COMMANDS = {"∞": "infty", "×": "times", "÷": "div", "·": "cdot", "π": "pi", "±": "pm", "≤": "le", "≥": "ge"}
_COMMANDS |= {"≠": "ne", "∪": "cup", "∩": "cap", "∈": "in", "∅": "emptyset"}
_SIGNS |= {sign: rf"\{command} " for sign, command in _COMMANDS.items()}
_KEYBOARD = str.maketrans(_SIGNS)

_WORDS = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*"
_WRAPPED = re.compile(_WORDS + r"\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,;:! ]|\\(?:quad|qquad|left|right|displaystyle)(?![a-zA-Z])|[$\s]")
_POWER_OF_TEN = re.compile(r"(?<![\w.])([+-]?\d+(?:\.\d*)?|[+-]?\.\d+)[eE]([+-]?\d{1,4})(?!\w)")
_PERCENT = r"(?:percent(?:age)?|pct)"
_COUNTED = r"[\u3005-\u30ff\u3400-\u9fff\uac00-\ud7af]"  # words of East Asian scripts; these are numbers among them:
_NUMERALS = "〇零一二两三四五六七八九十百千万萬亿億兆半点分之"
_CURRENCIES = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₩": "won"}
_TIDY = (
    (re.compile(r"(?<!\\)~"), " "),  # a space that doesn't break
    (re.compile(r"^\s*\*\*|\*\*[\s.]*$"), ""),  # Markdown's bold
    (re.compile(r"(?<!\.)\.([\s$]*)$"), r"\1"),  # a sentence's end
    (re.compile(r"(?<![\w)}\]\s])(\s*)–(?=\s*[\d.\\(a-zA-Z])"), r"\1-"),  # behind a number it may mean "to"
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!\s*)(?=\d{3}(?!\d))"), ","),  # LaTeX's commas between thousands
    (  # spaces between thousands, unless more digits follow
        re.compile(r"(?<![\w.,])(?<!\d\s)\d{1,3}(?:(?:\s|\\[, ])\d{3})+(?!\w|[.,]\d|(?:\s|\\[, ]|\s*/\s*)\.?\d)"),
        lambda number: re.sub(r"\D", "", number[0]),
    ),
    (re.compile(rf"(?<=[\d}}])\s*((?:(?![{_NUMERALS}]){_COUNTED})+)\s*$"), r"\\text{ \1}"),  # a unit
    (re.compile(r"([€£¥₹₩])\s*([\d.,]*\d)"), lambda price: rf"{price[2]}\text{{ {_CURRENCIES[price[1]]}}}"),
    (re.compile(r"(?<=\d)\s*([€£¥₹₩])"), lambda price: rf"\text{{ {_CURRENCIES[price[1]]}}}"),
    (re.compile(rf"{_WORDS}\{{\s*{_PERCENT}\s*\}}|(?<![a-zA-Z\\]){_PERCENT}(?![a-zA-Z])"), r"\\%"),
    (_POWER_OF_TEN, r"\1 \\times 10^{\2}"),  # or its e would be a variable
    (re.compile(r"^([\s$]*)(?:=|≈|\\approx(?![a-zA-Z])|\\sim(?:eq)?(?![a-zA-Z]))"), r"\1"),  # of what stood before
    (re.compile(r"\\(?:mathrm|text|textrm|mathit)\s*\{\s*([ei])\s*\}"), r" \1"),  # a number, no unit
    (re.compile(r"(?<=[a-zA-Z])('+)(?![a-zA-Z])"), lambda primes: "^{" + r"\prime" * len(primes[1]) + "}"),
    (re.compile(r"\\degree(?![a-zA-Z])"), r"^\\circ"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|(\d+|[a-zA-Z]))"), r"\\sqrt{\1\2\3}"),
    (re.compile(rf"(?<=\d)\^(?:\{{(?:{_WORDS}\{{)?|{_WORDS}\{{)(?:st|nd|rd|th)\}}{{1,2}}"), ""),  # ordinals
    (re.compile(r"(?<![\s,])[\s,]*\\(?:text|mbox|textrm)\s*\{[\s,]*(?:and|or)\s*\}"), ", "),  # between items
)
_BETWEEN_NUMBERS = re.compile(r"(?<=\d)(?:\s|\\[,;: ])+(?=\.?\d)")  # to take it off would make one number of two
_BETWEEN_ITEMS = re.compile(r"(?<=\d),(?:\s|\\[,;: ])+(?=\d{3}(?!\d))")  # or thousands would be made of them
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")

# a unit: words after a number, as text or (only of what is compared with a plain number) without
_POWERED = r"(?:[^{}\d]|\^\{?-?\d\}?)*"
_UNIT_WORD = _WORDS + rf"\{{{_POWERED}[^\W\d_]{_POWERED}\}}"
_UNIT_END = rf"(?:{_UNIT_WORD}|\^\{{?-?\d\}}?|_\{{?\\odot\}}?|\\cdot(?![a-zA-Z])|\\[,;:! ]|[\s/.$])*$"
_UNIT_START = r"(?:\\[,;:! ]|[\s]|\^\{?\\circ\}?)*"
_UNIT = re.compile(rf"{_UNIT_START}(?:\\mu\s*)?{_UNIT_WORD}{_UNIT_END}")
_NO_UNIT = (
    r"or|and|if|not|to|mod|plus|minus|times|squared|cubed|factorial|choose|over|divided|negative|root|less|more|wrong"
    r"|(?:dozen|hundred|thousand|[mb]illion|trillion|lakh|crore|tenth|hundredth|thousandth|third|quarter|pair)s?"
    r"|half|halves|gross|score|mil"
)
# words that are units also where they stand right behind the number, as letters that are multiplied might
_CLOSE_UNIT = (
    r"[kcdmnMG][mgslVWJKNALC]|eV|Hz|Pa|ft|yd|lbs?|oz|hrs?|mph|miles?|feet|foot|inch(?:es)?|yards?|dollars?|cents?"
    r"|yrs?|sec|min|pounds?|degrees?|hours?|minutes?|seconds?|days?|years?|met(?:er|re)s?|lit(?:er|re)s?|grams?|units?"
)
_BARE_UNIT = re.compile(
    rf"{_UNIT_START}(?:\\(?:AA|Omega)(?![a-zA-Z])|\\mu(?![a-zA-Z])\s*[a-zA-Z]{{1,2}}|M_\{{?\\odot\}}?"
    rf"|(?:(?<=[\d}})ic]\s)(?!(?:{_NO_UNIT})\b)(?:(?:square|cubic|sq\.?|cu\.?)\s)?(?:[a-zA-Z]{{3,}}|[mghslLKNJWV]|{_CLOSE_UNIT})"
    rf"|(?<=[\d}})\s])(?:{_CLOSE_UNIT}))(?:/[a-zA-Z]+)?){_UNIT_END}"
)

# words that say more than a unit, and signs that math-verify leaves out together with what follows
_SCALED = re.compile(rf"[\d}}]\s*{_WORDS}\{{\s*(k|M|B|bn|mn|tn)\s*\}}")  # thousands to trillions
_DECISIVE = re.compile(_WORDS + rf"\{{([^{{}}]*(?:\d|\b(?:{_NO_UNIT})\b)[^{{}}]*)\}}")
_OVERLOOKED = re.compile(r"\d'|\\[bp]?mod(?![a-zA-Z])|\\equiv(?![a-zA-Z])|\\[lc]?dots(?![a-zA-Z])|%\s*\\?%|(?i:answer)")
_PRIME = re.compile(r"\\prime(?![a-zA-Z])")
_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
_BASE = re.compile(r"\d_\{?(\d+)")
_ONLY_WORDS, _WORD = re.compile(r"[a-zA-Z]{2,}(?:[=<>,;]+[a-zA-Z]{2,})*"), re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]{2,}")
_TUPLE, _SET = re.compile(r"\([^()]*,[^()]*\)"), re.compile(r"\\\{[^()]*\\\}")

# numbers whose digits fill the memory: powers of powers, exponents and factorials beyond any answer's
_SMALL_POWER = re.compile(r"\((?:-?\d{1,4}(?:/\d{1,4})?|-?\\frac\{\d{1,4}\}\{\d{1,4}\})\)\^\{?-?\d{4}(?!\d)\}?")
_RUNAWAY = re.compile(
    r"\^\{*\(?[+-]?\d+\}*\^|(?:\^|\*\*)\{?\(?[+-]?\d{6}|[)\]](?:\^|\*\*)\{?\(?[+-]?\d{4}"
    r"|\^\{[^{}]*\^\{[^{}]*\^|\\[dt]?binom\{(?:\d+\^|\d{6})|\\sqrt\{[^{}]*\^\{?\d{5}|\^\{?\d+\}?!|\d{5}\)?!|\d\)?!\)?!|\d{1000}"
)


def tidy(answer: str) -> str:
    """The answer in the spelling that math-verify reads."""
    answer = answer.translate(_KEYBOARD)
    for pattern, replacement in _TIDY:
        answer = pattern.sub(replacement, answer)
    return answer.strip()


def plain(answer: str) -> str:
    """The answer as text to be compared: without what only changes how it looks; space stays between numbers alone."""
    text = _BETWEEN_ITEMS.sub(";", _BETWEEN_NUMBERS.sub("␣", tidy(answer)))
    text = _WRAPPED.sub(r"\1", _SPACING.sub("", text).replace("␣", " "))
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\^\{?\\circ\}?|°", "", text)
    text = re.sub(r"^\(([a-zA-Z])\)$", r"\1", text.rstrip("."))  # a choice
    if _THOUSANDS.fullmatch(text):
        return text.replace(",", "")
    return text.lower() if text.isalpha() and text != "E" else text  # e is a number


def matched(gold: str, answer: str) -> tuple[str, str]:
    """The two where brackets or products may be read into them: such that only what is meant is equal.

    A list in parentheses is an ordered one, also where only one of the two has these. What consists of words alone, be
    it `BAC` or `SRAC=LRAC`, has no factors.
    """
    for one, other in ((gold, answer), (answer, gold)):
        if _TUPLE.fullmatch(plain(one)) and len(items(other)) > 1:
            gold, answer = (f"({text})" if text == other else text for text in (gold, answer))
    if _ONLY_WORDS.fullmatch(plain(gold)):
        gold, answer = (_WORD.sub(r"\\text{\g<0>}", _WRAPPED.sub(r"\1", text)) for text in (gold, answer))
    return gold, answer


def has_letters(answer: str) -> bool:
    """Whether there are variables; not in LaTeX commands, nor in words and units."""
    return re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", _WRAPPED.sub("", answer))) is not None


def items(answer: str) -> list[str]:
    """What stands between the commas that are in no brackets, as `plain` gives it."""
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
    number = re.split(r"(?<![<>!:])=|≈|\\approx(?![a-zA-Z])", value)[-1]
    if found is None or has_letters(number) or not re.search(r"\d|\\pi|\\infty", number):
        return answer, ""
    return value + "$" * (value.count("$") % 2), re.sub(r"[{}.]|(?<=[a-z]{3})s$", "", plain(found[0]))


def is_misread(gold: str, answer: str) -> bool:
    """Whether math-verify would overlook in the answer what makes it another one than the right one."""
    right, given = plain(gold), plain(answer)
    if any(words.findall(gold) != words.findall(answer) for words in (_DECISIVE, _SCALED)):
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
    if "=" in gold and len(_PRIME.findall(gold)) != len(_PRIME.findall(answer)):  # it leaves them out
        return True
    lists = items(gold), items(answer)  # it takes them for sets
    repeated = any(len(set(found)) < len(found) for found in lists)
    return repeated and min(map(len, lists)) > 1 and sorted(lists[0]) != sorted(lists[1])


def is_runaway(answer: str) -> bool:
    """Whether reading or computing it could take very long."""
    text, depth = _SPACING.sub("", answer), 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth > MAX_DEPTH:
            return True
    return _RUNAWAY.search(_SMALL_POWER.sub("", text)) is not None
