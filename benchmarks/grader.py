r"""Checks the grader on the 1,560 problems of the maths suites and GSM8K's, and writes what it gets wrong.

    python -m benchmarks.grader --path data   # some minutes; default: $GVPO_DATA, with evaluation_suite and gsm_8k

Of each problem the right answer, boxed, must be worth 1, and so must that answer written otherwise; corrupted ones must
be worth 0. Written otherwise and corrupted are those of `grader_answers`, by kinds. Corrupted are also, one at a time:

* every number in the answer, by one more: `\frac{3}{56}` becomes `\frac{4}{56}` and `\frac{3}{57}`;
* the sign of an answer that is a single value other than 0: a minus in front, or the one there taken away;
* the last letter that is not in a LaTeX command, by the next one, in answers without units: `p - q` becomes `p - r`;
* an answer that is a number N is put beside N + 1, in ways that a policy could learn in order to give two answers at
  once: `HEDGES`.

Where there are alternatives the first is corrupted, and what then equals another one's text is left out. Beside those
two kinds of exceptions the answers are listed that math-verify can't read: they are right only as they are written.
GSM8K's answers are few numbers, so each is checked once, also by the rule that compares last numbers.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.grader_answers import KINDS, changed, is_formula, rewritten, word_of
from gvpo_lightning.data.rows import load_splits
from gvpo_lightning.rewards import ExactAnswer
from gvpo_lightning.rewards.maths import BoxedMath, gold_answers, is_readable, plain

RESULTS = Path(__file__).parent / "results" / "grader.json"
PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
START, END = "<!-- measured: python -m benchmarks.grader -->\n", "<!-- end of measured -->"
DIRECTIONS = ("refused", "accepted")
SPLITS = {"aime": 30, "amc": 83, "math": 500, "minerva": 272, "olympiad_bench": 675}

HEDGES = (
    *(r"%s = %s", r"%s \approx %s", r"%s \equiv %s", r"%s \bmod %s", "%s, %s", "%s:%s", "%s %s"),
    *(r"%s \text{ or } %s", r"%s \text{ (or %s)}", r"\text{between } %s \text{ and } %s"),
    r"%s \text{ if even, } %s \text{ if odd}",
)

_NUMBER = re.compile(r"\d+(?:\.\d+)?|\.\d+")
_LETTER = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]*?([a-zA-Z])(?![a-zA-Z])")


def corrupted(alternatives: list[str]) -> dict[str, str]:
    """Answers that differ from all the right ones, by what has been done to the first of these."""
    answer, right = alternatives[0], {plain(text) for text in alternatives}
    wrong = dict([*_numbers(answer), *_sign(answer), *_letter(answer)])
    return {name: text for name, text in wrong.items() if plain(text) not in right}


def _numbers(answer: str) -> Iterator[tuple[str, str]]:
    for count, found in enumerate(_NUMBER.finditer(answer)):
        whole, dot, decimals = found[0].partition(".")
        yield f"number {count}", f"{answer[: found.start()]}{int(whole or 0) + 1}{dot}{decimals}{answer[found.end() :]}"


def _sign(answer: str) -> Iterator[tuple[str, str]]:
    inner = answer.strip("$ ")
    if is_formula(inner):
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
    word = word_of(alternatives[0])

    def is_right(answer: str, gold: Any = gold) -> bool:
        return grade([""], [f"The answer is $\\boxed{{{answer}}}$."], answer=[gold]) == [1.0]

    right = {f"as it is {number}": answer for number, answer in enumerate(alternatives)}
    right |= rewritten(alternatives)
    wrong = corrupted(alternatives) | hedged(alternatives) | changed(alternatives)
    of_word = (
        {"bare " + name: text for name, text in changed([word]).items()} if word else {}
    )  # as datasets have it too
    accepted = {name: answer for name, answer in wrong.items() if is_right(answer)}
    return {
        "refused": {name: answer for name, answer in right.items() if not is_right(answer)},
        "accepted": accepted | {name: answer for name, answer in of_word.items() if is_right(answer, word)},
        "literal": not any(is_readable(answer) for answer in alternatives),
        "tried": {"refused": _counted(right), "accepted": _counted(wrong | of_word)},
    }


def check_last_number(gold: str) -> dict[str, Any]:
    """As `check_problem`, of the rule that compares the last numbers in a text."""
    grade = ExactAnswer(compare="last_number")

    def is_right(answer: str) -> bool:
        return grade(
            [""], [f"So it costs 12 times as much, which is {answer}."], answer=[f"3 + 4 = 7\n#### {gold}"]
        ) == [1.0]

    whole = int(gold.replace(",", ""))
    texts = {"as it is 0": gold, "sign 0": f"{whole}".replace("-", "−"), "sign 1": f"{whole}".replace("-", "–")}
    texts |= {f"thousands {comma}": f"{whole:,}".replace(",", comma) for comma in (",", "{,}", ",\\!")}
    texts |= {"power of ten": f"{whole}00e-2", "decimals": f"{whole}.0"}
    wrong = {"number 0": f"{whole + 1}", "thousands": f"{whole}{{,}}000", "power of ten": f"{whole}e1"} if whole else {}
    wrong |= {f"sign {minus}": f"{minus}{abs(whole)}" for minus in "-−–" if whole > 0}
    return {
        "refused": {name: answer for name, answer in texts.items() if not is_right(answer)},
        "accepted": {name: answer for name, answer in wrong.items() if is_right(answer)},
        "literal": False,
        "tried": {"refused": _counted(texts), "accepted": _counted(wrong)},
    }


def _counted(answers: dict[str, str]) -> dict[str, int]:
    """How many there are of each kind; `other` are those that only this file makes."""
    kinds = Counter(next((kind for kind in KINDS if kind in name), "other") for name in answers)
    return dict(sorted(kinds.items()))


def gsm8k_answers(path: Path) -> list[str]:
    """The different right answers of GSM8K."""
    rows = load_splits(str(path))
    return sorted({answer for split in rows for answer in rows[split]["answer"]})


def check_suite(path: str) -> dict[str, Any]:
    """Of every split: how many problems and answers there are, and the exceptions."""
    available = load_splits(f"{path}/evaluation_suite")
    golds: dict[str, list[Any]] = {split: list(available[split]["answer"]) for split in SPLITS}
    for split, count in SPLITS.items():
        assert len(golds[split]) == count, f"{split} has {len(golds[split])} problems, not {count}"
    numbers = gsm8k_answers(Path(path) / "gsm_8k")
    report = {split: summed(answers, [check_problem(gold) for gold in answers]) for split, answers in golds.items()}
    report["gsm8k"] = summed(numbers, [check_problem(gold) for gold in numbers])
    report["gsm8k, last number"] = summed(numbers, [check_last_number(gold) for gold in numbers])
    return report


def summed(golds: list[Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """What came of the problems of one split."""
    exceptions = [
        {"problem": number, "gold": gold} | {name: result[name] for name in (*DIRECTIONS, "literal")}
        for number, (gold, result) in enumerate(zip(golds, results, strict=True))
        if result["refused"] or result["accepted"] or result["literal"]
    ]
    tried = {name: Counter[str]() for name in DIRECTIONS}
    for result in results:
        for name in DIRECTIONS:
            tried[name].update(result["tried"][name])
    return {
        "problems": len(golds),
        "tried": {name: dict(sorted(counts.items())) for name, counts in tried.items()},
        "problems_not_corrupted": sum(not result["tried"]["accepted"] for result in results),
        "exceptions": exceptions,
    }


def section(report: dict[str, Any]) -> str:
    """Everything between the page's markers, as Markdown."""
    header = [
        "suite",
        "problems",
        "right answers",
        "corrupted answers",
        "right, but refused",
        "corrupted, but accepted",
    ]
    rows = [[*header, "can't be read"], ["---", *["---:"] * 6]]
    exceptions = []
    for split, counts in report.items():
        found = counts["exceptions"]
        numbers = [
            counts["problems"],
            *(sum(counts["tried"][direction].values()) for direction in DIRECTIONS),
            *(sum(len(exception[direction]) for exception in found) for direction in DIRECTIONS),
        ]
        rows.append([split, *(f"{number:,}" for number in numbers), str(sum(e["literal"] for e in found))])
        exceptions += [_exception(split, exception) for exception in found]
    by_kind = [["kind", "right answers", "refused", "corrupted answers", "accepted"], ["---", *["---:"] * 4]]
    for kind in (*KINDS, "other"):
        cells = [f"{number:,}" for direction in DIRECTIONS for number in _of_kind(report, kind, direction)]
        by_kind.append([kind, *cells])
    return "\n\n".join(
        [_table(rows), _table(by_kind), "The exceptions, by suite and number of the problem:", "\n".join(exceptions)]
    )


def _of_kind(report: dict[str, Any], kind: str, direction: str) -> tuple[int, int]:
    """How many answers of a kind were tried, and how many of them went wrong."""
    tried = sum(counts["tried"][direction].get(kind, 0) for counts in report.values())
    wrong = [_counted(e[direction]).get(kind, 0) for counts in report.values() for e in counts["exceptions"]]
    return tried, sum(wrong)


def _table(rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _exception(split: str, exception: dict[str, Any]) -> str:
    found = [f"{name}: `{answer}`" for name in DIRECTIONS for answer in exception[name].values()]
    literal = ["math-verify can't read it, so it is right only as it is written"] if exception["literal"] else []
    gold = " or ".join(f"`{answer}`" for answer in dict.fromkeys(gold_answers(exception["gold"])))
    return f"- {split} {exception['problem']}, {gold}: {'; '.join([*found, *literal])}"


def updated_page(page: str, report: dict[str, Any]) -> str:
    """The page with what stands between its markers made anew."""
    before, rest = page.split(START)
    return before + START + "\n" + section(report) + "\n\n" + END + rest.split(END)[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("GVPO_DATA")
    parser.add_argument("--path", default=data)
    path = parser.parse_args().path
    if path is None or not all((Path(path) / name).is_dir() for name in ("evaluation_suite", "gsm_8k")):
        sys.exit(
            f"grader: --path={path} is no folder with evaluation_suite and gsm_8k: give one, or set GVPO_DATA to it"
        )
    report = check_suite(path)
    RESULTS.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(updated_page(PAGE.read_text(), report))


if __name__ == "__main__":
    main()
