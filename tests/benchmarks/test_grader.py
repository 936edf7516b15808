"""The grader's published exceptions are what it gets wrong, and all that it gets wrong."""

import json

import pytest

from benchmarks.grader import PAGE, RESULTS, SPLITS, check_problem, check_suite, corrupted, hedged, main, updated_page
from gvpo_lightning.data.rows import load_splits


@pytest.fixture(scope="module")
def record():
    return json.loads(RESULTS.read_text())


def test_page_is_up_to_date(record):
    assert PAGE.read_text() == updated_page(PAGE.read_text(), record), "run python -m benchmarks.grader"


def test_all_problems_were_checked_and_few_are_exceptions(record):
    assert {split: counts["problems"] for split, counts in record.items()} == SPLITS
    assert sum(SPLITS.values()) == 1560
    exceptions = [exception for counts in record.values() for exception in counts["exceptions"]]
    assert not any(exception["refused"] for exception in exceptions)
    assert len(exceptions) <= 5
    assert sum(counts["corrupted"] for counts in record.values()) > 4000
    assert all(counts["problems_not_corrupted"] == 0 for counts in record.values())


def test_a_sample_and_every_exception(record, shared_data):
    """Every 25th problem, and those that are published."""
    available = load_splits(str(shared_data / "evaluation_suite"))
    for split, counts in record.items():
        known = {exception["problem"]: exception for exception in counts["exceptions"]}
        answers = available[split]["answer"]
        for number in sorted({*range(0, len(answers), 25), *known}):
            found = check_problem(answers[number])
            expected = known.get(number, {"refused": [], "accepted": {}, "literal": False})
            assert found.items() >= {name: expected[name] for name in ("refused", "accepted", "literal")}.items(), (
                split,
                number,
            )


@pytest.mark.slow
def test_every_problem(record, shared_data):
    assert json.loads(json.dumps(check_suite(str(shared_data / "evaluation_suite")))) == record


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
    with pytest.raises(SystemExit, match=r"^grader: --path=.* is no folder: .*GVPO_DATA to its parent$"):
        main()
