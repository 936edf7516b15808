"""The grader's published exceptions are what it gets wrong, and all that it gets wrong."""

import json
from fractions import Fraction

import pytest

from benchmarks.grader import (
    DIRECTIONS,
    PAGE,
    RESULTS,
    SPLITS,
    check_last_number,
    check_problem,
    check_suite,
    corrupted,
    gsm8k_answers,
    hedged,
    main,
    updated_page,
)
from benchmarks.grader_answers import KINDS, changed, rewritten, value_of
from gvpo_lightning.data.rows import load_splits


@pytest.fixture(scope="module")
def record():
    return json.loads(RESULTS.read_text())


def test_page_is_up_to_date(record):
    assert PAGE.read_text() == updated_page(PAGE.read_text(), record), "run python -m benchmarks.grader"


def test_all_problems_were_checked_and_few_are_exceptions(record):
    problems = {split: counts["problems"] for split, counts in record.items()}
    assert problems == SPLITS | {"gsm8k": 983, "gsm8k, last number": 983}
    assert sum(SPLITS.values()) == 1560
    exceptions = [exception for counts in record.values() for exception in counts["exceptions"]]
    assert not any(exception["refused"] for exception in exceptions)
    assert len(exceptions) <= 5
    assert sum(number for counts in record.values() for number in counts["tried"]["accepted"].values()) > 100_000
    assert sum(counts["problems_not_corrupted"] for counts in record.values()) <= 1  # of last numbers, 0 is not
    for kind in KINDS:
        assert all(any(counts["tried"][direction].get(kind) for counts in record.values()) for direction in DIRECTIONS)


def test_a_sample_and_every_exception(record, shared_data):
    """Every 40th problem, and those that are published."""
    available = load_splits(str(shared_data / "evaluation_suite"))
    numbers = gsm8k_answers(shared_data / "gsm_8k")
    golds = {split: available[split]["answer"] for split in SPLITS} | {"gsm8k": numbers, "gsm8k, last number": numbers}
    for split, counts in record.items():
        known = {exception["problem"]: exception for exception in counts["exceptions"]}
        check = check_last_number if split == "gsm8k, last number" else check_problem
        for number in sorted({*range(0, len(golds[split]), 40), *known}):
            found = check(golds[split][number])
            expected = known.get(number, {"refused": {}, "accepted": {}, "literal": False})
            assert found.items() >= {name: expected[name] for name in (*DIRECTIONS, "literal")}.items(), (split, number)


@pytest.mark.slow
def test_every_problem(record, shared_data):
    assert json.loads(json.dumps(check_suite(str(shared_data)))) == record


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("14", {"2(7)", r"1400\%", "１４", "+14"}, {"1(13)", "1 13", r"14\frac12", "14,000", "−14"}),
        ("-5", {"−5", "– 5", r"-500\text{ percent}", "-5(1)"}, {"5", "-5 1/2", "-1(4)", "-5{,}000"}),
        ("1,234", {"1{,}234", r"1\,234", "1 234", "2(617)"}, {"234,000", r"12340\%", "1(1233)"}),
        (r"\frac{5}{2}", {r"2\frac{1}{2}", "2 1/2", r"250\%"}, {r"2\left(\frac{1}{2}\right)", "3 1/2", "2(1/2)"}),
        (r"\frac18", {r"12\frac{1}{2}\%"}, {r"125\%", r"1\frac{1}{8}"}),
        ("east", {"EAST", r"\text{ East }"}, {"tsae", r"\text{aste}", "aest"}),
        ("p - 2qr", {"p - 2rq", r"\frac{2(p - 2qr)}{2}", "−(−(p - 2qr))"}, {"2(p - 2qr)", "−(p - 2qr)"}),
    ],
)
def test_answers_are_rewritten_and_changed_by_what_they_are_worth(answer, right, wrong):
    assert set(rewritten([answer]).values()) >= right
    assert set(changed([answer]).values()) >= wrong
    assert not set(rewritten([answer]).values()) & set(changed([answer]).values())


def test_what_another_alternative_says_is_not_wrong():
    assert "2(7)" in changed(["9", "15"]).values() or "1(8)" in changed(["9", "15"]).values()
    assert "1(8)" not in changed(["9", "8"]).values()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("025", 25),
        ("10,\\!080", 10080),
        ("$-2.5$", Fraction(-5, 2)),
        ("-\\frac34", Fraction(-3, 4)),
        ("3/4", Fraction(3, 4)),
    ],
)
def test_values_of_numbers(text, value):
    assert value_of(text) == value
    assert value_of(text + "x") is None


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        (["204"], {"205", "-(204)"}),
        (["-7"], {"-8", "7"}),
        (["\\frac{3}{56}"], {"\\frac{4}{56}", "\\frac{3}{57}", "-(\\frac{3}{56})"}),
        (["p - q"], {"p - r", "-(p - q)"}),
        (["\\text{Evelyn}"], {"\\text{Evelyo}"}),
        (["\\pi"], {"-(\\pi)"}),
        (["0"], {"1"}),
        (["1,-2"], {"2,-2", "1,-3"}),
        (["0.01", "0.02"], {"1.01", "-(0.01)"}),
        (["1", "2"], {"-(1)"}),  # 2 is right
        (["15\\mbox{ cm}"], {"16\\mbox{ cm}"}),
    ],
)
def test_corrupted_answers_are_different_ones(alternatives, expected):
    assert set(corrupted(alternatives).values()) == expected


def test_hedges_are_for_numbers_alone():
    found = hedged(["$-2.5$"])
    assert {"-2.5 = -3.5", "-3.5 = -2.5", "-2.5:-3.5", "-2.5_{7}"} <= set(found.values())
    assert len(found) == len(set(found.values()))
    assert hedged(["x=5"]) == hedged(["\\frac{1}{2}"]) == {}


@pytest.mark.parametrize("data", [None, "nowhere"])
def test_no_data_is_one_line(monkeypatch, data):
    monkeypatch.setattr("sys.argv", ["grader"])
    if data is None:
        monkeypatch.delenv("GVPO_DATA", raising=False)
    else:
        monkeypatch.setenv("GVPO_DATA", data)
    with pytest.raises(SystemExit, match=r"^grader: --path=.* is no folder with .*, or set GVPO_DATA to it$"):
        main()
