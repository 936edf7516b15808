"""Grades garbage and prints how many completions were wrong: python -m tests.rewards.fuzz_script REQUIRE_BOX."""

import random
import sys

from gvpo_lightning.rewards import BoxedMath

PIECES = [
    *(r"\boxed{", "}", "{", r"\frac", r"\sqrt[", "]", r"\left(", r"\right)", "$", "$$", "x", "12", "-", "^", "_"),
    *(r"\begin{pmatrix}", "&", r"\\", r"\end{pmatrix}", "=", "<", ",", ";", "%", r"\%", "!", "|", "∞", "\n", "'"),
    *("é", "漢", "\u202e", "\x00", "π", "\ud800", "<answer>", "</answer>", r"\text{", r"\int", r"\sum_{", r"\pm"),
    *(r"\cup", r"\{", r"\}"),
]
GOLDS = [
    "5",
    r"\frac{1}{2}",
    "1,2",
    "x=5",
    "(0,1]",
    r"\text{east}",
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
    ["1", "2"],
]
DEEP = [r"\boxed{" * 300, r"\boxed{" + r"\frac{" * 120 + "}", r"\boxed{" + "(" * 100 + ")" * 100 + "}", "{" * 5000]


def main(require_box: bool) -> None:
    grade, rng, wrong = BoxedMath(require_box=require_box), random.Random(0), 0
    for number in range(120):
        body = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 14)))
        completion = body if number % 5 == 0 else rf"so \boxed{{{body}}}"
        [value] = grade([""], [completion], answer=[rng.choice(GOLDS)])
        assert value in (0.0, 1.0)
        wrong += value == 0
    for text in DEEP:
        assert grade([""], [text], answer=["5"]) == [0.0]
    print(wrong)


if __name__ == "__main__":
    main(sys.argv[1] == "1")
