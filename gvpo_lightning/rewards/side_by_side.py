r"""What stands side by side in a formula is multiplied, unless it is a mixed number: spelt out for latex2sympy.

latex2sympy adds a whole number to the rational number behind it: `7(2)` is 9 to it, and `3\binom{5}{2}` is 13. A power
is no whole number to it, so `7^{1}(2)` is 14, and binds as `7(2)` does. Mixed numbers become fractions.
"""

import re

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+|\s+|.", re.DOTALL)
_SPACE = re.compile(r"\s+|~|\\[,;:!\s]|\\q?quad|\\displaystyle")
_NAMED = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|bb|cal|sf)|mbox|operatorname|begin|end)")
_BRACKET_SIZE = re.compile(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*(?=[()\[\]])")
_WITH_ARGUMENTS = re.compile(r"\\(?:[dtc]?frac|[dt]?binom|sqrt)")
_FUNCTION = re.compile(r"\\(?:lfloor|lceil|gcd|lcm|max|min|det|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan)h?|cot|sec|csc)")
_OVER = re.compile(r"\s*/\s*(\d+)(?![\d.^_!])")
_ONLY_FRACTION = re.compile(r"\s*\\frac\{\s*(\d+)\s*\}\{\s*(\d+)\s*\}\s*")

# What stands before: a whole number, another literal, what may be a number, or a power, which is multiplied rightly.
NOTHING, WHOLE, DECIMAL, CLOSED, POWER = "", "whole", "decimal", "closed", "power"
_CLOSING = dict.fromkeys((")", "]", r"\rfloor", r"\rceil"), CLOSED)


class Unclear(ValueError):
    """Numbers with nothing but space between them, more digits than a command takes, or braces that do not match."""


def spell_out(latex: str) -> str:
    r"""The formula as latex2sympy reads it rightly: `2\frac12x + 3(4)` becomes `\frac{5}{2}x + 3^{1}(4)`.

    Raises:
        Unclear: who knows what is meant.
    """
    latex = _BRACKET_SIZE.sub("", latex)
    spelt, end = _Reader(latex + "}").group(0)
    if end != len(latex) + 1:
        raise Unclear("a brace is closed that was not opened")
    return spelt


class _Reader:
    """Reads a formula factor by factor; a position is one in `latex`."""

    def __init__(self, latex: str) -> None:
        self.latex = latex

    def _token(self, position: int) -> str:
        found = _TOKEN.match(self.latex, position)
        return found[0] if found else ""

    def _after_space(self, position: int) -> int:
        while _SPACE.fullmatch(token := self._token(position)):
            position += len(token)
        return position

    def group(self, position: int) -> tuple[str, int]:
        """What stands from there to the brace that closes it, spelt out, and the position after that brace."""
        out: list[str] = []
        last = NOTHING
        while (token := self._token(position)) and token != "}":
            after = position + len(token)
            if _SPACE.fullmatch(token):
                out.append(token)
            elif token[-1].isdecimal():
                last, after = self._number(out, last, token, after)
            elif token in ("^", "_"):
                argument, after = self._power(after)
                out.append(token + argument)
                last = last and POWER
            elif token in ("%", r"\%") and last:
                last = _append(out, last, r"\frac{1}{100}")
            elif token == "{" or _WITH_ARGUMENTS.fullmatch(token):
                factor, after = self._factor(token, after)
                fraction = _ONLY_FRACTION.fullmatch(factor[1:-1] if token == "{" else factor)
                is_mixed = fraction is not None and _mix(out, last, *fraction.groups())
                last = CLOSED if is_mixed else _append(out, last, factor)
            elif token in ("(", "[") or _FUNCTION.fullmatch(token):
                _append(out, last, token)
                last = NOTHING
            elif _NAMED.fullmatch(token):
                after = self._after_names(token, after)
                out.append(self.latex[position:after])
                last = NOTHING
            elif token == r"\pi" and self._token(self._after_space(after)) == "(":
                out.append(r"{\pi}")  # no function
                last = CLOSED
            else:
                out.append(token)
                last = last and POWER if token in ("!", "'") else _CLOSING.get(token, NOTHING)
            position = after
        if not token:
            raise Unclear("a brace is not closed")
        return "".join(out), position + 1

    def _number(self, out: list[str], last: str, token: str, after: int) -> tuple[str, int]:
        over = _OVER.match(self.latex, after)
        if over and _mix(out, last, token, over[1]):
            return CLOSED, over.end()
        if last in (WHOLE, DECIMAL):
            raise Unclear(f"{token!r} stands behind another number")
        _append(out, last, token)
        return DECIMAL if "." in token else WHOLE, after

    def _factor(self, token: str, after: int) -> tuple[str, int]:
        """A group in braces, or a command with its arguments, each of which is put into braces."""
        if token == "{":
            inside, after = self.group(after)
            return "{" + inside + "}", after
        command = re.sub(r"^\\[dtc](?=frac|binom)", r"\\", token)
        if command == r"\sqrt" and self._token(self._after_space(after)) == "[":
            end = self.latex.find("]", after)
            command, after = command + self.latex[self._after_space(after) : end + 1], max(end + 1, after)
        for _ in range(1 if token == r"\sqrt" else 2):
            argument, after = self._argument(self._after_space(after))
            command += argument
        if argument[1:-1].isdecimal() and self.latex[after - 1] != "}" and self._token(after)[:1].isdecimal():
            raise Unclear(f"{token} is followed by more digits than it takes")
        return command, after

    def _argument(self, position: int) -> tuple[str, int]:
        """What a command takes: a group, a command with its own arguments, or a single sign."""
        token = self._token(position)
        if token == "{":
            return self._factor(token, position + 1)
        if _WITH_ARGUMENTS.fullmatch(token):
            argument, position = self._factor(token, position + len(token))
            return "{" + argument + "}", position
        taken = token[:1] if token[:1].isdecimal() else token
        return "{" + taken + "}", position + len(taken)

    def _power(self, position: int) -> tuple[str, int]:
        """What stands behind ^ or _, where a number is whole even without braces."""
        token = self._token(position := self._after_space(position))
        if token in ("-", "+"):
            argument, position = self._power(position + 1)
            return "{" + token + argument + "}", position
        if token == "{" or _WITH_ARGUMENTS.fullmatch(token):
            return self._argument(position)
        if _NAMED.fullmatch(token):
            end = self._after_names(token, position + len(token))
            return self.latex[position:end], end
        return token, position + len(token)

    def _after_names(self, command: str, position: int) -> int:
        """Where the text that a command takes ends; an array has its columns too."""
        argument = re.compile(r"\s*\{(?:[^{}]|\{[^{}]*\})*\}" + (r"(?:\{[lcr|\s]*\})?" if command == r"\begin" else ""))
        found = argument.match(self.latex, position)
        return found.end() if found else position


def _append(out: list[str], last: str, factor: str) -> str:
    """Multiply what stands before, if anything does, by a factor; that is what then stands there."""
    out += ["^{1}", factor] if last in (WHOLE, CLOSED) else [factor]
    return CLOSED


def _mix(out: list[str], last: str, numerator: str, denominator: str) -> bool:
    """Put the mixed number in the place of its whole number; False where the two are none."""
    if last != WHOLE or not numerator.isdecimal() or not 0 < int(numerator) < int(denominator):
        return False
    while _SPACE.fullmatch(out[-1]):
        out.pop()
    whole = int(out.pop().replace(",", ""))
    out.append(rf"\frac{{{whole * int(denominator) + int(numerator)}}}{{{denominator}}}")
    return True
