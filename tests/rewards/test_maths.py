"""Boxed answers: what is taken for the answer, what equals what, and that no completion breaks the grader."""

import json
import pickle
import random
import subprocess
import sys
import threading

import pytest
from sympy.core.cache import clear_cache

from gvpo_lightning.rewards import BoxedMath, Rewards, RewardSettings
from gvpo_lightning.rewards.maths import _parse_answer, extract_answer, gold_answers, last_boxed, plain, same_answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("so \\boxed{5}.", "5"),
        ("first \\boxed{4}, no: $\\boxed{ \\frac{1}{2} }$", "\\frac{1}{2}"),
        ("\\boxed{\\left\\{ x > \\frac{1}{x^{2}} \\right\\}}", "\\left\\{ x > \\frac{1}{x^{2}} \\right\\}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed {7}", "7"),
        ("\\boxed 7.", "7"),
    ("\\boxed 1.5, so", "1.5"),
        ("\\boxed{3} and then \\boxed{4", "3"),  # the last one that is closed
        ("\\boxed{\\boxed{8}}", "8"),
        ("\\boxed{}", None),
        ("\\boxed{42}, checked: \\boxed{}", "42"),
        ("\\boxed{42} $\\boxed{\\,}$ \\fbox{ }", "42"),
        ("\\boxed{5} \\fbox{73}", "73"),
        ("\\boxed{5} \\boxed{~\\quad}, \\boxed{\\ldots}", "5"),
        ("so \\boxed\\frac12.", "\\frac12"),
        ("\\boxed -\\dfrac{1}{2}$", "-\\dfrac{1}{2}"),
        ("$\\boxed\\sqrt{2}$", "\\sqrt{2}"),
        ("\\boxed\\text{East}", "\\text{East}"),
        ("\\boxed{4", None),
        ("the answer is 4", None),
        ("<think>\\boxed{1}</think> <answer>42</answer>", "42"),
        ("<think>\\boxed{1}</think> <answer> so \\boxed{42} </answer>", "42"),
        ("<answer>1</answer> <answer>2", "2"),
        ("<answer></answer>", None),
    ("\\boxed{5}, as the <answer> is", "5"),
    ("\\boxed{5} <answer></answer>", "5"),
        ("", None),
    ],
)  # fmt: skip
def test_answer_of_a_completion(completion, answer):
    assert extract_answer(completion) == answer


def test_answers_without_a_box_are_only_taken_where_that_is_asked_for():
    text = "Let us see. 3 + 4 = 7, so the answer is 7."
    assert BoxedMath()([""], [text], answer=["7"]) == [0.0]
    assert BoxedMath(require_box=False)([""], [text], answer=["7"]) == [1.0]
    assert BoxedMath(require_box=False)([""], [text + " \\boxed{8}"], answer=["7"]) == [0.0]
    assert BoxedMath(require_box=False)([""], ["no idea"], answer=["7"]) == [0.0]


EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("\\frac{1}{3}", "0.333333"),
    ("025", "25"),
    ("142.0", "142"),
    ("10,\\!080", "10080"),
    ("\\$32,\\!348", "32348"),
    ("4.5e33", "4.5 \\times 10^{33}"),
    ("1.325 \\times 10^{-27}", "1.325e-27"),
    ("3.61e-10", "3.61 \\cdot 10^{-10}"),
    ("62.5%", "0.625"),
    ("62.5%", "62.5"),
    ("$8 \\%$", "8\\%"),
    ("90^\\circ", "90"),
    ("864 \\mbox{ inches}^2", "864"),
    ("\\text{Evelyn}", "evelyn"),
    ("\\text{(C)}", "C"),
    ("52_8", "52_{8}"),
    ("3, 5, 7", "7, 3, 5"),
    ("$69$,$84$", "\\{84, 69\\}"),
    ("1 \\pm \\sqrt{19}", "1+\\sqrt{19}, 1-\\sqrt{19}"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)"),
    ("(-\\infty, 0) \\cup\\{1\\}", "\\{1\\} \\cup (-\\infty, 0)"),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "\\begin{bmatrix} -\\frac13 \\\\ \\frac23 \\end{bmatrix}"),
    ("(a+5)(b+2)", "ab + 2a + 5b + 10"),
    ("x=5", "5"),
    ("5", "x = 5"),
    ("y = 2x + 3", "2x - y = -3"),
    ("f(x)=x,f(x)=-x", "f(x) = -x, f(x) = x"),
    ("\\frac{1}{\\sqrt{2}}c", "\\frac{c}{\\sqrt{2}}"),
    ("E_{1},E_{2}", "E_2, E_1"),
    ("\\gamma^{2}-1", "(\\gamma - 1)(\\gamma + 1)"),
    ("k \\geqslant 2", "k \\ge 2"),
    ("9.6", "\\approx 9.6"),
    ("7", "$=7$"),
    ("7", "3 + 4 = 7"),
    ("\\frac{2}{3}", "x = \\frac{4}{6} = \\frac{2}{3} \\approx 0.67"),
    ("12\\pi", "V = \\pi r^2 h = 12\\pi"),
    ("9.6", "9.6\\%"),
    ("90", "90\\degree"),
    ("\\emptyset", "\\varnothing"),
    ("2\\sqrt{2}", "2√2"),
    ("2\\sqrt{x+1}", "2√(x+1)"),
    ("5", "5^{\\text{th}}"),
    ("f(x)=x \\text{ and } f(x)=0", "f(x)=0, f(x)=x"),
    ("4.5e33", "4.5 \\times 10^{33} \\text{ erg/s}"),
    ("9.6", "9.6~\\mathrm{K}"),
    ("9.6", "9.6 \\, \\mu m"),
    ("9.6", "9.6\\,\\mu\\text{m}"),
    ("9.6", "9.6 \\AA"),
    ("9.6", "9.6\\,\\Omega"),
    ("9.6", "9.6 km/s"),
    ("9.6", "9.6 eV"),
    ("5", "5 apples"),
    ("3.14", "\\pi \\approx 3.14"),
    ("\\pi", "\\pi \\approx 3.14"),
    ("5, 6", "x = 5 \\text{ or } x = 6"),
    ("5.4 \\text{ cents}", "5.4\\text{ cent}"),
    ("5\\text{ cm}", "5"),
    ("15\\mbox{ cm}^2", "15 \\text{ cm}^{2}"),
    ("\\text{(E)}", "E"),
    ("2011015", "\\sum_{n=1}^{2005} n"),
    ("3^{2005}+1", "1+\\left(3\\right)^{2005}"),
    ("-\\frac{1}{2^{2005}}", "\\left(-\\frac{1}{2}\\right)^{2005}"),
    ("2^{2005}", "2 \\cdot 2^{2004}"),
    # what stands side by side is multiplied
    ("14", "7(2)"),
    ("78", "\\frac{12(13)}{2}"),
    ("30", "3\\binom{5}{2}"),
    ("30", "3\\binom52"),
    ("12", "(2)(2)(3)"),
    ("6", "2[3]"),
    ("12", "2\\gcd(6, 12)"),
    ("6", "2\\lfloor 3.5 \\rfloor"),
    ("36\\pi", "\\frac43\\pi(3)^3"),
    ("1/8", "1/4(2)"),
    # but for mixed numbers
    ("\\frac83", "2 2/3"),
    ("\\frac52", "2\\frac12"),
    ("\\frac52x", "2\\frac12 x"),
    ("-\\frac52", "-2\\frac12"),
    ("\\frac52\\pi - 1", "2\\,\\tfrac{1}{2}\\pi - 1"),
    ("\\frac52", "x = 2 1/2 = 2.5"),
    ("2.5", "2½"),
    # percents
    ("\\frac18", "12\\frac12\\%"),
    ("12.5\\%", "12 1/2%"),
    ("3.05", "3 + 5\\%"),
    ("0.15", "15 percent"),
    # signs, digits and marks of other keyboards
    ("-5", "−5"),
    ("-5", "–5"),
    ("5", "５"),
    ("(-\\infty,0)", "(−∞,０)"),
    ("-1234", "−1,234"),
    ("x^2+1", "x²+1"),
    ("2\\pi", "2π"),
    ("73", "**73**"),
    ("5", "5元"),
    ("5", "€5"),
    ("5", "5 €"),
    ("1234", "1 234"),
    ("1234", "1{,}234"),
    ("1000000", "1\\,000\\,000"),
    # brackets around a list that the other one lacks
    ("2,7", "(2,7)"),
    ("(2,7)", "2,7"),
    # names
    ("ABC", "\\text{ABC}"),
    ("xy", "x \\cdot y"),
    ("SRAC=LRAC", "LRAC = SRAC"),
    ("m", "(1)(m)"),
    ("2\\mathrm{i}", "2\\text{i}"),
    ("2", "\\sum_{n=0}^{\\infty} \\frac{1}{2^n}"),
    ("\\infty", "+∞"),
    # units, and names before a number
    ("42", "42 square units"),
    ("42", "42 ft"),
    ("42", "42mph"),
    ("4\\pi", "4\\pi square cm"),
    ("12\\pi", "12\\pi cm^2"),
    ("4.5", "A = 4.5\\text{ cm}^2"),
    ("4.5", "x = 4.5\\mathrm{~cm^{2}}"),
    ("4.5e33", "L = 4.5\\times10^{33}\\ \\text{erg s}^{-1}"),
    ("15\\mbox{ cm}^2", "A = 15 \\text{ cm}^{2}"),
    ("7", "\\theta = 7"),
    ("7", "f'(2) = 7"),
    ("30^\\circ", "\\angle A = 30^\\circ"),
    ("2500,7500", "2\\,500, 7\\,500"),
    ("16,3,1,1", "1,1,3,16"),
    ("x' - x = 0", "x^{\\prime} = x"),
]
DIFFERENT = [
    ("\\frac{1}{3}", "0.3333"),
    ("1.325 \\times 10^{-27}", "1.326 \\times 10^{-27}"),
    ("1.325 \\times 10^{-27}", "0"),
    ("10^{-20}", "10^{-21}"),
    ("2^{1009}", "2^{1009}+1"),
    ("52_8", "52_9"),
    ("3, 5, 7", "3, 5"),
    ("3, 5", "3, 5, 7"),
    ("(3,4]", "[3,4]"),
    ("(1,2)", "(2,1)"),
    ("\\text{Evelyn}", "Navin"),
    ("\\text{(C)}", "D"),
    ("\\frac{1}{\\sqrt{2}}c", "\\frac{1}{\\sqrt{2}}"),
    ("\\frac{dM}{dt}=2M^{6}", "\\frac{dM}{dt}=3M^{6}"),
    ("\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{2}", "\\hbar \\omega(v+1 / 2)-\\frac{E_{0}^{2}}{3}"),
    ("\\gamma^{2}-1", "\\gamma^{2}-2"),
    ("x = \\frac{e^{t}}{3} + ce^{-2t}", "x = \\frac{e^{t}}{3} + ce^{-3t}"),
    ("5", ""),
    ("5", "5 or 6"),
    ("5", "6=5"),
    ("5", "5=6"),
    ("5", "x = 6 = 5"),
    ("5", "7=6=5"),
    ("7", "5=6=7"),
    ("5", "5 \\approx 6"),
    ("5", "6 \\approx 5"),
    ("1000", "1001=1000"),
    ("5", "5:1"),
    ("5", "5_6"),
    ("5", "5'"),
    ("5", "5 \\mod 6"),
    ("6", "5 \\equiv 6"),
    ("5", "5\\ldots"),
    ("5", "5\\text{ 6}"),
    ("5", "5\\text{ (or 6)}"),
    ("5", "5\\text{ or }6"),
    ("5", "5\\text{ if even, } 6\\text{ if odd}"),
    ("5", "5\\text{ dollars and }6\\text{ cents}"),
    ("5", "5\\text{ million}"),
    ("5", "5 million"),
    ("5", "5 pi"),
    ("0", "1 0"),
    ("5", "5\\text{ squared}"),
    ("5", "5.4=5"),
    ("6", "5.9 \\approx 6"),
    ("\\text{east}", "\\text{west}"),
    ("2516", "2516_8"),
    ("2516_8", "2516"),
    ("(1,2)", "\\{1,2\\}"),
    ("\\{1,2\\}", "(1,2)"),
    ("1,1,2", "1,2"),
    ("1,2", "1,1,2"),
    ("e", "E"),
    ("E", "e"),
    ("5\\text{ cm}", "5\\text{ m}"),
    ("5\\text{ cm}", "5 km"),
    ("5\\text{ cm}", "5 m"),
    ("864 \\mbox{ inches}^2", "864 \\mbox{ inches}^3"),
    ("50\\%", "0.5\\%"),
    ("2\\mathrm{i}", "2"),
    ("2\\Omega", "2"),
    ("9", "7(2)"),
    ("25/2", "\\frac{12(13)}{2}"),
    ("13", "3\\binom{5}{2}"),
    ("7", "(2)(2)(3)"),
    ("5", "2[3]"),
    ("8", "2\\gcd(6, 12)"),
    ("\\frac43", "2 2/3"),
    ("\\frac52", "2\\left(\\frac12\\right)"),
    ("\\frac52", "2 \\cdot \\frac12"),
    ("\\frac72", "2\\frac32"),
    ("\\frac92", "2^2\\frac12"),
    ("\\frac{21}{2}", "2 1/2"),
    ("21/2", "2 1/2"),
    ("5", "2 3"),
    ("123", "12 3"),
    ("12", "1 2"),
    ("1/200", "12\\frac12\\%"),
    ("6", "12\\frac12\\%"),
    ("5", "5万"),
    ("5", "2–3"),
    ("5", "−5"),
    ("BAC", "ABC"),
    ("ABC", "CBA"),
    ("east", "seat"),
    ("\\text{east}", "seat"),
    ("xy", "yx"),
    ("SRAC=LRAC", "SARC=LRAC"),
    ("7", "7\\text{i}"),
    ("7", "7\\text{k}"),
    ("7", "7\\text{ k}"),
    ("7", "7\\text{M}"),
    ("7", "7k"),
    ("7", "7t"),  # math-verify leaves out t, c and others as units
    ("2,7", "(7,2)"),
    ("(2,7)", "7,2"),
    ("(2,7)", "[2,7]"),
    ("5", "5,000"),
    # math-verify would take a part for the whole, sets for lists, and leave primes out
    ("\\frac{5}{7}", "\\frac{14}{3} \\implies \\frac{5}{7}"),
    ("\\frac{5}{7}", "\\frac{14}{3} | \\frac{5}{7}"),
    ("\\frac{5}{7}", "\\frac{14}{3} ? \\frac{5}{7}"),
    ("f(x)=ax+b, where $b$ is whole, and $a$ has $g(a)=0$", "0"),
    ("16,3,1,1", "16,3,3,1"),
    ("1002", "1, 002"),
    ("1234567", "1,234, 567"),
    ("x' - x = 0", "x'' - x = 0"),
    ("x' + 2x = 0", "x + 2x' = 0"),
    ("7", "6 = \\theta = 7"),
    ("42", "42xy"),
    ("42", "42\\text{ thousands}"),
    ("5", "answer 6 \\vee $5$"),
    ("12", "12\\%\\%"),
    ("42", "42 hundredths"),
    ("42", "42\\text{ over six}"),
    ("4.5", "5 = 4.5\\text{ cm}"),
    ("15\\mbox{ cm}^2", "A = 15 \\text{ cm}^{3}"),
    ("4", "\\infty 7"),
    ("0", "\\infty - \\infty"),
    ("1", "\\infty^0"),
    ("5", "\\frac{1}{0}"),
    ("\\infty", "-\\infty"),
    ("\\frac{\\log 2}{\\log 2-\\log 3}", "\\frac{\\log 2}{\\log 3-\\log 3}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal_as_mathematics(gold, answer):
    assert same_answer(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_as_mathematics(gold, answer):
    assert not same_answer(gold, answer)


def test_grades_do_not_depend_on_those_before_them():
    """sympy draws random numbers and keeps what it has worked out: some of these were right once in a hundred times."""
    answers = [r"\infty 7", r"\infty\cdot 7", r"\infty - 7", r"-\infty 7", r"\infty x", r"\frac{\infty}{7}"]
    pairs = [(gold, answer) for gold in ("1", "4", "8", "-3", "x") for answer in answers]
    rng = random.Random(0)
    for _ in range(10):
        clear_cache()
        _parse_answer.cache_clear()
        rng.shuffle(pairs)
        assert not any(same_answer(gold, answer) for gold, answer in pairs)


@pytest.mark.parametrize(
    ("gold", "alternatives"),
    [
        ("5", ["5"]),
        (5, ["5"]),
        (142.0, ["142"]),
        (0.5, ["0.5"]),
        (["9.6\n"], ["9.6"]),
        ("['9.6\\n']", ["9.6"]),
        ("['2', '\\\\frac{4}{2}']", ["2", "\\frac{4}{2}"]),
        ('["f\'(x)=2x"]', ["f'(x)=2x"]),
        ("[1, 2]", ["[1, 2]"]),  # an interval, not a list
        ("['a]", ["['a]"]),
        (["5", None], ["5"]),
    ],
)
def test_right_answers_as_datasets_have_them(gold, alternatives):
    assert gold_answers(gold) == alternatives


def test_any_alternative_is_right():
    grade = BoxedMath("final_answer")
    completions = [f"\\boxed{{{answer}}}" for answer in ("0.01", "0.02", "0.03")]
    assert grade([""] * 3, completions, final_answer=[["0.01\n", "0.02\n"]] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("gold", [None, "", [], [None], "  "])
def test_a_row_without_an_answer_is_named(gold):
    with pytest.raises(ValueError, match="'answer' of row 1: a right answer is needed, got"):
        BoxedMath()([""] * 2, ["\\boxed{5}"] * 2, answer=["5", gold])


def test_an_answer_that_hangs_costs_itself_alone():
    rewards = Rewards(BoxedMath(), RewardSettings(num_workers=1, timeout=2.0))
    completions = ["\\boxed{5}", "5", "\\boxed{\\sum_{n=1}^{99999} n^{99999}}", "\\boxed{\\frac{10}{2}}"]
    try:
        found, _ = rewards([""] * 4, completions, {"answer": ["5"] * 4, "level": [1] * 4})
    finally:
        rewards.close()
    assert [rewarded.total for rewarded in found] == pytest.approx([1.0, 0.0, float("nan"), 1.0], nan_ok=True)


def test_it_can_be_sent_to_workers_and_names_its_column():
    grade = pickle.loads(pickle.dumps(BoxedMath("gold")))
    assert grade([""], ["\\boxed{5}"], gold=["5"]) == [1.0]
    with pytest.raises(ValueError, match=r"BoxedMath needs the columns \['gold'\]"):
        Rewards(grade)(["p"], ["c"], {"level": [1]})


def test_no_main_thread_is_needed():
    found = []
    thread = threading.Thread(target=lambda: found.append(BoxedMath()([""], ["\\boxed{\\frac{2}{4}}"], answer=["0.5"])))
    thread.start()
    thread.join()
    assert found == [[1.0]]


RUNAWAY = [
    "9^{9^{9^9}}",
    "9^9^9^9",
    "10^{10000000}",
    "10^10000000",
    "1000000!",
    "((9!)!)!",
    "9!!!",
    "9" * 4000,
    "2**9999999",
    "(x+1)^{5000}",
    "(2^{99999})^{99999}",
    "\\left(1+i\\right)^{99999}",
    "e^{e^{e^{99}}}",
    "10^{12345}!",
    "\\sqrt{2^{99999}+1}",
    "\\binom{10^9}{5 \\cdot 10^8}",
    "\\frac{" * 100 + "1" + "}{2}" * 100,
    "\\sqrt{" * 130 + "2" + "}" * 130,
]


@pytest.mark.parametrize("answer", RUNAWAY, ids=lambda text: text[:12])
def test_runaway_numbers_are_wrong_at_once(answer):
    """Without the guards most of them would take hours."""
    assert BoxedMath()([""], [f"\\boxed{{{answer}}}"], answer=["5"]) == [0.0]


@pytest.mark.parametrize("require_box", ["1", "0"])
def test_garbage_is_wrong_and_never_an_error(require_box, root):
    """In a process of its own, which can be given up on."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.rewards.fuzz_script", require_box],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert json.loads(found.stdout) >= 110


def test_last_boxed_of_a_long_text():
    rng = random.Random(0)
    text = "".join(rng.choice(["\\boxed{", "a", "}", "{"]) for _ in range(20_000)) + "\\boxed{5}"
    assert last_boxed(text) == "5"
    assert last_boxed("\\boxed{" * 3000) is None
    assert last_boxed("\\boxed{ " * 12_000 + " }" * 12_000) is not None
    assert last_boxed("\\boxed{" * 3000 + "5" + "}" * 3000) == "5"


def test_imports_are_no_part_of_a_completions_time_limit():
    """Nothing is left to import, which takes longer than any answer."""

    class Importing(BoxedMath):
        def __call__(self, prompts, completions, **columns):
            before = set(sys.modules)
            assert super().__call__(prompts, completions, **columns) == [1.0]
            return [float(len(set(sys.modules) - before))]

    rewards = Rewards(Importing(), RewardSettings(num_workers=1))
    found, _ = rewards(["p"] * 3, [r"\boxed{\frac12}"] * 3, {"answer": ["0.5"] * 3})
    rewards.close()
    assert [rewarded.total for rewarded in found] == [0.0] * 3


@pytest.mark.parametrize(
    "text",
    [
        *(" " * 50_000, "7" * 50_000, "\\text{" * 10_000, "\\, " * 15_000, "√" * 50_000, "元" * 50_000, "**" * 25_000),
        *("1 " * 25_000, "1 000 " * 8_000, "1,000" * 10_000, "€5" * 25_000, "percent " * 6_000, "–" * 50_000),
    ],
    ids=lambda text: text[:8],
)
def test_plain_text_of_a_long_answer_comes_to_an_end(text):
    assert plain("5" + text + "!").endswith("!")  # minutes, if a pattern goes back over the text
