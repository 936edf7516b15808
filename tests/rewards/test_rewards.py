import collections
import functools
import math
from datetime import date
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch

from gvpo_lightning.rewards import ExactAnswer, Rewards, check_reward_columns, last_number, reward_columns, reward_name

PROMPTS, COMPLETIONS, COLUMNS = ["p", "q"], ["one", "three"], {"answer": ["1", "3"], "level": [0, 1]}


def compute_rewards(reward, prompts, completions, columns):
    """In the training process: NaN where there is none."""
    return [rewarded.total for rewarded in Rewards(reward)(prompts, completions, columns)[0]]


def by_length(prompts, completions, **columns):
    return [len(c) for c in completions]


def by_level(prompts, completions, *, level, scale=1.0, **columns):
    return [scale * value for value in level]


class ByAnswer:
    def __init__(self, bonus=0.0):
        self.bonus = bonus

    def __call__(self, prompts, completions, answer, **columns):
        return [float(a) + self.bonus for a in answer]


@pytest.mark.parametrize(
    ("reward", "expected", "name"),
    [
        (by_length, [3, 5], "by_length"),
        (by_level, [0, 1], "by_level"),
        (lambda prompts, completions, **columns: [prompts == PROMPTS, False], [1, 0], "<lambda>"),
        (lambda p, c, answer, level: [0, 1], [0, 1], "<lambda>"),
        (ByAnswer(0.5), [1.5, 3.5], "ByAnswer"),
        (ByAnswer(0.5).__call__, [1.5, 3.5], "__call__"),
        (functools.partial(by_level, scale=3.0), [0, 3], "by_level"),
        (ExactAnswer(), [0, 0], "ExactAnswer"),
    ],
)
def test_any_callable_is_a_reward(reward, expected, name):
    found = compute_rewards(reward, PROMPTS, COMPLETIONS, COLUMNS)
    assert found == expected
    assert all(type(value) is float for value in found)
    assert reward_name(reward) == name


@pytest.mark.parametrize(
    "values",
    [
        [0.5, -2],
        (0.5, -2),
        np.array([0.5, -2], dtype=np.float32),
        torch.tensor([0.5, -2.0], dtype=torch.bfloat16),
        [np.float16(0.5), np.int64(-2)],
        [torch.tensor(0.5), np.array(-2.0)],
        [Fraction(1, 2), -2],
        pd.Series([0.5, -2.0], index=[7, 3]),
        np.array([0.5, -2], dtype=object),
        collections.deque([0.5, -2]),
    ],
    ids=str,
)
def test_numbers_of_every_kind(values):
    assert compute_rewards(lambda p, c, **k: values, PROMPTS, COMPLETIONS, {}) == [0.5, -2.0]


def test_numbers_beyond_a_float_are_not_finite():
    rewarded, _ = Rewards(lambda p, c, **k: [10**400, Fraction(-(10**5000), 3)])(PROMPTS, COMPLETIONS, {})
    assert [entry.failure for entry in rewarded] == ["reward_not_finite"] * 2


def test_truth_values_are_numbers():
    assert compute_rewards(lambda p, c, **k: [True, np.bool_(False)], PROMPTS, COMPLETIONS, {}) == [1.0, 0.0]


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(torch.inf)])
def test_what_is_missing_or_not_finite_becomes_nan(value):
    found = compute_rewards(lambda p, c, **k: [value, 1.0], PROMPTS, COMPLETIONS, {})
    assert math.isnan(found[0])
    assert found[1] == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "The reward <lambda> must return one entry a completion, 2, got 1"),
        ([1.0] * 3, "one entry a completion, 2, got 3"),
        (1.0, "one entry a completion, 2, got float"),
        (None, "one entry a completion, 2, got NoneType"),
        ((value for value in (1.0, 2.0)), "one entry a completion, 2, got generator"),
        ({0: 1.0, 1: 2.0}, "one entry a completion, 2, got dict: return a list, a tuple or a 1-d array"),
        ({0.25, 0.5}, "got set: return a list"),
        (frozenset({0.25, 0.5}), "got frozenset"),
        (b"12", "got bytes: return a list"),
        (bytearray(b"12"), "got bytearray"),
        (memoryview(b"12"), "got memoryview"),
        ({0: 1.0, 1: 2.0}.values(), "got dict_values"),
        (np.array(1.0), r"got ndarray of shape \(\): return a list"),
        (np.ones((2, 1)), r"got ndarray of shape \(2, 1\)"),
        (pd.DataFrame({"a": [1.0, 2.0]}), r"got DataFrame of shape \(2, 1\)"),
        ([1.0, 1j], "must return numbers or None, got 1j for the completion 'three'"),
        (np.array([1.0, 1j]), "must return numbers or None"),
        ([np.bytes_(b"1"), 1.0], "must return numbers or None"),
        ([np.array("1"), 1.0], "must return numbers or None"),
        ([np.datetime64("2024-01-05"), 1.0], "must return numbers or None"),
        ([{0: 1.0}, {0.25}], "must return numbers or None"),
        ([b"1", 1.0], "must return numbers or None, got b'1'"),
        (["good", 1.0], "must return numbers or None, got 'good' for the completion 'one'"),
        ([1.0, [1.0]], r"must return numbers or None, got \[1.0\] for the completion 'three'"),
        (np.array(["a", "b"]), "must return numbers or None"),
        (torch.ones(2, 1), r"got Tensor of shape \(2, 1\)"),
        ("ab", "one entry a completion, 2, got str: return a list"),
    ],
)
def test_answers_that_are_no_rewards(values, message):
    with pytest.raises(ValueError, match=message):
        compute_rewards(lambda p, c, **k: values, PROMPTS, COMPLETIONS, {})


@pytest.mark.parametrize(
    ("reward", "missing"),
    [
        (ByAnswer(), "answer"),
        (ExactAnswer("solution"), "solution"),
        (by_level, "level"),
        (lambda p, c, target, other=1, **columns: [0, 0], "target"),
    ],
)
def test_missing_columns_are_named_before_the_call(reward, missing):
    with pytest.raises(
        ValueError, match=rf"needs the columns \['{missing}'\], but besides the prompt the dataset has \['x'\]"
    ):
        compute_rewards(reward, PROMPTS, COMPLETIONS, {"x": [1, 2]})


def test_columns_that_a_reward_does_not_take_are_named_before_the_call():
    with pytest.raises(ValueError, match=r"also \['level'\]: let it take \*\*columns"):
        check_reward_columns(lambda prompts, completions, answer: [0, 0], {"answer", "level"})
    check_reward_columns(lambda prompts, completions, answer: [0, 0], {"answer"})
    check_reward_columns(lambda prompts, completions: [0, 0], set())


@pytest.mark.parametrize("column", ["prompts", "completions"])
def test_columns_by_the_names_of_what_a_reward_is_given_are_refused(column):
    with pytest.raises(ValueError, match=rf"the dataset's columns \['{column}'\]: give these columns other names"):
        compute_rewards(by_length, PROMPTS, COMPLETIONS, {column: ["a", "b"]})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("42", 42),
        ("The answer is 7.", 7),
        ("first 3, then 8 apples", 8),
        ("#### 1,234", 1234),
        ("$1,234,567.50 in all", 1234567.5),
        ("30,000", 30000),
        ("2,3", 3),  # a list, not thousands
        ("1,2345", 2345),
        ("12,34", 34),
        ("-5", -5),
        ("it is -1,000.25", -1000.25),
        ("5-3", 3),  # a subtraction
        ("5 - 3", 3),
        ("5 -3", -3),
        ("3.14", 3.14),
        ("3.0", 3),
        ("007", 7),
        ("half: .5", 0.5),
        ("wait...5", 5),
        ("12345678", 12345678),
        ("7\n", 7),
        ("−5", -5),
        ("it is –5.", -5),
        ("3–5", 5),  # from 3 to 5
        ("10%–20%", 20),
        ("5−3", 3),
        ("1e5", 100000),
        ("1.5E-3 m", 0.0015),
        ("-2e3.", -2000),
        ("2e", 2),
        ("#3e5f", 5),
        ("1{,}234", 1234),
        ("12{,}345{,}678", 12345678),
        ("1,\\!234", 1234),
        ("９", 9),
        ("none at all", None),
        ("", None),
        ("-", None),
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("19", "19", 1),
        (" 19\n", "19", 1),
        ("19", 19, 1),
        ("19.0", "19", 0),
        ("019", "19", 0),
        ("It is 19", "19", 0),
        ("72", 72.0, 1),  # what a column with a 0.5 in it makes of 72
        ("72.0", 72.0, 0),
        ("-72", np.float32(-72), 1),
        ("72", Decimal("72.00"), 1),
        ("72", Fraction(144, 2), 1),
        ("0.5", 0.5, 1),
        ("0.50", Decimal("0.50"), 1),
        ("1e+30", 1e30, 1),
        ("True", True, 1),
        ("1", True, 0),
        ("72", b"72", 1),
        ("2024-01-05", date(2024, 1, 5), 1),
        ("inf", float("inf"), 1),
        ("", "19", 0),
    ],
)
def test_exact_text(completion, answer, expected):
    assert ExactAnswer()(["p"], [completion], answer=[answer]) == [expected]


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so he pays 30000 dollars", "30,000", 1),
        ("so he pays $30,000.00.", "30000", 1),
        ("30", "30,000", 0),
        ("72", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 1),
        ("24", "Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", 0),
        ("72 or 73", "72", 0),
        ("-3", "3", 0),
        ("−3", "-3", 1),
        ("1e5", "100,000", 1),
        ("12345678901234567890", "12345678901234567891", 0),  # one and the same float
        ("9" * 400, "8" * 400, 0),
        ("1e9999", "1" + "0" * 9999, 1),
        ("5-3", "3", 1),
        ("no idea", "72", 0),
        ("no idea", "none", 0),  # nothing found on either side is no match
        ("", "72", 0),
        ("7", 7, 1),
        ("so 72", 72.0, 1),
        ("$1,000", Decimal("1000.00"), 1),
        ("0.50", 0.5, 1),
        ("1", 0.5, 0),
    ],
)
def test_exact_last_number(completion, answer, expected):
    found = ExactAnswer("a", compare="last_number")(["p"], [completion], a=[answer], other=[1])
    assert found == [expected]


@pytest.mark.parametrize("compare", ["text", "last_number"])
@pytest.mark.parametrize("answer", [None, math.nan, np.float32("nan")])
def test_no_completion_is_the_right_answer_where_there_is_none(compare, answer):
    with pytest.raises(ValueError, match="ExactAnswer needs a right answer, but 'answer' is null: leave the row out"):
        ExactAnswer(compare=compare)(["p"], [str(answer)], answer=[answer])


def test_an_unknown_comparison_is_refused():
    with pytest.raises(ValueError, match="compare must be 'text' or 'last_number', got 'fuzzy'"):
        ExactAnswer(compare="fuzzy")


def test_every_answer_of_gsm8k_is_read(shared_data):
    from datasets import load_from_disk

    data = load_from_disk(str(shared_data / "gsm_8k"))["train"]
    answers = data["answer"][:]
    assert len(answers) == 8792
    assert all(last_number(answer) is not None for answer in answers)
    exact = ExactAnswer(compare="last_number")
    assert sum(exact(answers, answers, answer=answers)) == len(answers)
    shifted = answers[1:] + answers[:1]
    assert sum(exact(answers, shifted, answer=answers)) < 0.05 * len(answers)
    assert exact(["30000 dollars"], ["30000 dollars"], answer=[next(a for a in answers if a == "30,000")]) == [1.0]


def test_partial_rewards_have_the_names_of_what_they_call():
    strict, lenient = functools.partial(by_level, scale=3.0), functools.partial(functools.partial(ByAnswer(0.5)))
    found, _ = Rewards([strict, lenient, by_length])(PROMPTS, COMPLETIONS, COLUMNS)
    assert found[1].components == {"by_level": 3.0, "ByAnswer": 3.5, "by_length": 5.0}
    twice = [functools.partial(by_level, scale=scale) for scale in (1.0, 2.0)]
    with pytest.raises(ValueError, match=r"different names, got \['by_level', 'by_level'\].* reward.name = 'strict'"):
        Rewards(twice)
    twice[0].name = "strict"
    assert list(Rewards(twice).functions) == ["strict", "by_level"]
    lambdas = [lambda p, c, **k: [0, 0], lambda p, c, **k: [1, 1]]
    with pytest.raises(ValueError, match=r"such as reward.name = 'strict', which functions and functools.partial take"):
        Rewards(lambdas)
    lambdas[1].name = "one"
    assert list(Rewards(lambdas).functions) == ["<lambda>", "one"]


def test_arguments_are_passed_by_name_whatever_their_order():
    def swapped(completions, prompts, **columns):
        return [
            float(completion == "y" and prompt == "x") for completion, prompt in zip(completions, prompts, strict=True)
        ]

    def of_completions_alone(completions, answer):
        return [float(completion == a) for completion, a in zip(completions, answer, strict=True)]

    assert compute_rewards(swapped, ["x"], ["y"], {}) == [1.0]
    assert compute_rewards(of_completions_alone, ["x"], ["y"], {"answer": ["y"]}) == [1.0]


def test_a_wrapped_reward_takes_whatever_columns_there_are():
    def wrapper(*arguments, **columns):
        return [1.0]

    check_reward_columns(wrapper, {"answer", "level"})
    assert compute_rewards(wrapper, ["a"], ["b"], {"answer": ["c"]}) == [1.0]


def test_what_is_recorded_of_completions_does_not_reach_rewards():
    row = {"prompt": "p", "answer": "1", "reward/judge": [1.0]}
    assert reward_columns(row) == ["answer", "reward/judge"]
    assert reward_columns(row | {"completions": ["a"], "rewards": [1.0], "token_ids": [[1]]}) == ["answer"]
