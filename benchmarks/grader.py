r"""Checks the grader on all 1,560 problems of the maths suites, and writes what it gets wrong.

    python -m benchmarks.grader --path data/evaluation_suite   # some minutes; default: evaluation_suite in $GVPO_DATA

Of each problem the right answer, boxed, must be worth 1, and corrupted ones 0. Corrupted are, one at a time:

* every number in the answer, by one more: `\frac{3}{56}` becomes `\frac{4}{56}` and `\frac{3}{57}`;
* the sign of an answer that is a single value other than 0: a minus in front, or the one there taken away;
* the last letter that is not in a LaTeX command, by the next one, in answers without units: `p - q` becomes `p - r`;
* an answer that is a number N is put beside N + 1, in ways that a policy could learn in order to give two answers at
  once: `HEDGES`.

Where there are alternatives the first is corrupted, and what then equals another one's text is left out. Beside those
two kinds of exceptions the answers are listed that math-verify can't read: they are right only as they are written.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gvpo_lightning.data.rows import load_splits
from gvpo_lightning.rewards.maths import BoxedMath, gold_answers, is_readable, plain

RESULTS = Path(__file__).parent / "results" / "grader.json"
PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
START, END = "<!-- measured: python -m benchmarks.grader -->\n", "<!-- end of measured -->"
KINDS = ("refused", "accepted")
SPLITS = {"aime": 30, "amc": 83, "math": 500, "minerva": 272, "olympiad_bench": 675}

HEDGES = (
    *(r"%s = %s", r"%s \approx %s", r"%s \equiv %s", r"%s \bmod %s", "%s, %s", "%s:%s", "%s %s"),
    *(r"%s \text{ or } %s", r"%s \text{ (or %s)}", r"\text{between } %s \text{ and } %s"),
    r"%s \text{ if even, } %s \text{ if odd}",
)

_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_LETTER = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]*?([a-zA-Z])(?![a-zA-Z])")
_SEVERAL = re.compile(r"[=<>,;\[\]]|\\(?:pm|cup|le|ge|geqslant|in|begin)(?![a-zA-Z])|\\text|\\mbox")


def corrupted(alternatives: list[str]) -> dict[str, str]:
    """Answers that differ from all the right ones, by what has been done to the first of these."""
    answer, right = alternatives[0], {plain(text) for text in alternatives}
    changed = dict([*_numbers(answer), *_sign(answer), *_letter(answer)])
    return {name: text for name, text in changed.items() if plain(text) not in right}


def _numbers(answer: str) -> Iterator[tuple[str, str]]:
    for count, found in enumerate(_NUMBER.finditer(answer)):
        whole, dot, decimals = found[0].partition(".")
        yield f"number {count}", f"{answer[: found.start()]}{int(whole or 0) + 1}{dot}{decimals}{answer[found.end() :]}"


def _sign(answer: str) -> Iterator[tuple[str, str]]:
    inner = answer.strip("$ ")
    letters = re.sub(r"\\[a-zA-Z]+", "x", inner)
    if _SEVERAL.search(inner) or not re.search(r"[1-9a-zA-Z]", letters) or re.search(r"[a-zA-Z]{3}", letters):
        return  # not one value, or 0, or a word
    yield "sign", inner[1:] if re.fullmatch(r"-[^-+]*", inner) else f"-({inner})"


def _letter(answer: str) -> Iterator[tuple[str, str]]:
    if re.search(r"\\text|\\mbox|\\mathrm|Hz|\d[eE]-?\d", answer) and re.search(r"\d", answer):
        return  # units are left out by the grader
    found = list(_LETTER.finditer(re.sub(r"\\[a-zA-Z]+", lambda command: "\\" * len(command[0]), answer)))
    if found:
        place, letter = found[-1].start(1), found[-1][1]
        after = {"z": "a", "Z": "A"}.get(letter, chr(ord(letter) + 1))
        yield "letter", answer[:place] + after + answer[place + 1 :]


def hedged(alternatives: list[str]) -> dict[str, str]:
    """Answers that give another number beside the right one, by the way in which they do; none where it isn't one."""
    number = alternatives[0].strip("$ ")
    if not re.fullmatch(rf"-?(?:{_NUMBER.pattern})", number):
        return {}
    [(_, other)] = _numbers(number)
    there = {f"hedge {hedge}": hedge % (number, other) for hedge in HEDGES}
    back = {f"hedge {hedge}, turned": hedge % (other, number) for hedge in HEDGES}
    return there | back | {"hedge base": f"{number}_{{7}}", "hedge prime": f"{number}'"}


def check_problem(gold: Any) -> dict[str, Any]:
    """The right answers that are `refused`, the corrupted ones that are `accepted`, and whether they can't be read."""
    grade, alternatives = BoxedMath(), gold_answers(gold)

    def reward(answer: str) -> float:
        return grade([""], [f"The answer is $\\boxed{{{answer}}}$."], answer=[gold])[0]

    wrong = corrupted(alternatives) | hedged(alternatives)
    return {
        "refused": [answer for answer in alternatives if reward(answer) != 1],
        "accepted": {name: answer for name, answer in wrong.items() if reward(answer) != 0},
        "literal": not any(is_readable(answer) for answer in alternatives),
        "num_corrupted": len(wrong),
    }


def check_suite(path: str) -> dict[str, Any]:
    """Of every split: how many problems and corrupted answers there are, and the exceptions."""
    available = load_splits(path)
    report: dict[str, Any] = {}
    for split, count in SPLITS.items():
        rows = available[split]
        assert len(rows) == count, f"{split} has {len(rows)} problems, not {count}"
        results = [check_problem(gold) for gold in rows["answer"]]
        exceptions = [
            {"problem": number, "gold": gold} | {name: result[name] for name in ("refused", "accepted", "literal")}
            for number, (gold, result) in enumerate(zip(rows["answer"], results, strict=True))
            if result["refused"] or result["accepted"] or result["literal"]
        ]
        corrupted_answers = sum(result["num_corrupted"] for result in results)
        without = sum(not result["num_corrupted"] for result in results)
        report[split] = {
            "problems": count,
            "corrupted": corrupted_answers,
            "problems_not_corrupted": without,
            "exceptions": exceptions,
        }
    return report


def section(report: dict[str, Any]) -> str:
    """Everything between the page's markers, as Markdown."""
    header = [
        "suite",
        "problems",
        "corrupted answers",
        "right, but refused",
        "corrupted, but accepted",
        "can't be read",
    ]
    rows = [header, ["---", *["---:"] * 5]]
    exceptions = []
    for split, counts in report.items():
        found = counts["exceptions"]
        numbers = [
            counts["problems"],
            counts["corrupted"],
            *(sum(map(len, (e[kind] for e in found))) for kind in KINDS),
        ]
        rows.append([split, *(f"{number:,}" for number in numbers), str(sum(e["literal"] for e in found))])
        exceptions += [_exception(split, exception) for exception in found]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join([table, "The exceptions, by suite and number of the problem:", "\n".join(exceptions)])


def _exception(split: str, exception: dict[str, Any]) -> str:
    refused = [f"refused: `{answer}`" for answer in exception["refused"]]
    accepted = [f"accepted: `{answer}`" for answer in exception["accepted"].values()]
    literal = ["math-verify can't read it, so it is right only as it is written"] if exception["literal"] else []
    gold = " or ".join(f"`{answer}`" for answer in dict.fromkeys(gold_answers(exception["gold"])))
    return f"- {split} {exception['problem']}, {gold}: {'; '.join([*refused, *accepted, *literal])}"


def updated_page(page: str, report: dict[str, Any]) -> str:
    """The page with what stands between its markers made anew."""
    before, rest = page.split(START)
    return before + START + "\n" + section(report) + "\n\n" + END + rest.split(END)[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("GVPO_DATA")
    parser.add_argument("--path", default=data and f"{data}/evaluation_suite")
    path = parser.parse_args().path
    if path is None or not Path(path).is_dir():
        sys.exit(f"grader: --path={path} is no folder: give that of the maths suites, or set GVPO_DATA to its parent")
    report = check_suite(path)
    RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(updated_page(PAGE.read_text(), report))


if __name__ == "__main__":
    main()
