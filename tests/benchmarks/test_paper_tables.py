"""Intervals and tests against published values, and claims of betas and methods that follow from them."""

import math

import pytest
from matplotlib.figure import Figure

from benchmarks.paper import beta, table1
from benchmarks.paper.tables import (
    Claim,
    decide,
    decide_all,
    decide_within,
    estimate,
    fisher_p,
    paired_difference,
    t_quantile,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("degrees", "level", "quantile"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (2, 0.99, 9.925), (5, 0.9, 2.015), (11, 0.95, 2.201), (120, 0.95, 1.980)],
)
def test_quantiles_are_the_published_ones(degrees, level, quantile):
    assert t_quantile(degrees, level) == pytest.approx(quantile, abs=5e-4)


def test_fishers_test_is_the_published_one():
    assert fisher_p(3, 1, 4, 4) == pytest.approx(0.4857, abs=1e-4)  # the lady tasting tea
    assert fisher_p(1, 9, 12, 12) == pytest.approx(0.002759, abs=1e-6)
    assert fisher_p(0, 0, 24, 24) == pytest.approx(1.0)


def test_what_is_not_finite_is_left_out_and_said():
    value = estimate([1.0, NAN, 2.0, math.inf])
    assert (value.mean, value.count, value.missing) == (1.5, 2, 2)
    assert str(value).endswith("(2 of 4 seeds)")
    assert str(estimate([NAN])) == str(estimate([])) == "n/a"
    assert decide(estimate([NAN, NAN])) is None


def test_seeds_that_only_one_has_are_missing():
    mine, theirs = ([{"seed": seed, "x": float(seed)} for seed in seeds] for seeds in ((0, 1, 2), (1, 2, 3)))
    found = paired_difference(mine, theirs, lambda row: row["x"])
    assert (found.mean, found.count, found.missing) == (0.0, 2, 2)


def test_within_is_decided_from_both_sides():
    near, far, wide = estimate([0.01, 0.011]), estimate([0.2, 0.201]), estimate([0.0, 0.1])
    assert [decide_within(value, 0.05) for value in (near, -near, far, -far, wide)] == [True, True, False, False, None]
    assert decide_all([near, near], decide) is True
    assert decide_all([near, -far], decide) is False
    assert decide_all([], decide) is None
    assert Claim("a", "b", True).source == "paper"


def row_of_beta(value, accuracy, *, seed=0, method="GVPO", predicted=None, **more):
    at = {"accuracy": accuracy, "kl": 1.0, "entropy": 0.5}
    labels = {"task": "sums", "method": method, "beta": value}
    return {"labels": labels, "seed": seed, "end": at, "stopped": None, "predicted": predicted} | more


def rows_of_betas(accuracies, predicted, seeds=3):
    return [
        row_of_beta(value, accuracy + 0.03 * seed, seed=seed, predicted=predicted and predicted[value])
        for value, accuracy in accuracies.items()
        for seed in range(seeds)
    ]


def test_change_over_beta_is_told_from_the_optimums_own():
    rows = rows_of_betas({0.03: 0.9, 0.1: 0.9, 0.5: 0.75}, {0.03: 1.0, 0.1: 1.0, 0.5: 0.85})
    paper, theory, *_ = beta.claims(rows)
    assert (paper.source, paper.holds) == ("paper", False)
    assert "from 1.000 to 0.850" in paper.measured
    assert (theory.source, theory.holds) == ("theory", True)
    (unknown,) = beta.claims(rows_of_betas({0.03: 0.9, 0.1: 0.9, 1.0: 0.2}, None))
    assert unknown.holds is True
    assert all(claim.holds is None for claim in beta.claims([row for row in rows if row["seed"] == 0]))


def test_betas_of_grpo_and_stopped_runs_are_shown():
    rows = [
        row_of_beta(0.1, 0.9, predicted=1.0),
        row_of_beta(0.04, 0.9, method="GRPO", predicted=0.987),
        row_of_beta(0.5, 0.9, predicted=1.0, end=None, stopped="update 3"),
    ]
    assert "0.987" not in beta.table(rows)
    assert "n/a (stopped: 1)" in beta.table(rows)
    beta.plot(rows, Figure())
    beta.plot(rows[1:2], Figure())
    assert beta.claims(rows[1:2]) == []


def row_of_table(method, accuracy, rate=1e-3, *, seed=0, phase="final", stopped=None):
    labels = {"phase": phase, "task": "sums", "method": method, "learning_rate": rate}
    at = {"accuracy": accuracy, "kl": 1.0, "entropy": 0.5}
    measured = {"start": at | {"accuracy": 0.4}, "end": None if stopped else at, "predicted": None}
    return {"labels": labels, "seed": seed, "stopped": stopped} | measured


def test_best_learning_rate_is_a_finite_one_and_its_edge_is_marked():
    tuning = [
        row_of_table("GVPO", accuracy, rate, phase="tuning", stopped=stopped)
        for accuracy, rate, stopped in (
            (0.5, 1e-4, None),
            (NAN, 3e-4, None),
            (0.0, 1e-3, "update 3"),
            (0.5, 3e-3, None),
        )
    ]
    assert table1.best_learning_rate(tuning) == 1e-4
    assert "0.0001 (the grid's edge)" in table1.table([*tuning, row_of_table("GVPO", 0.5, 1e-4)])
    assert "edge" not in table1.table([*tuning, row_of_table("GVPO", 0.5, 1e-3)])


def test_claims_of_table_1_say_whose_they_are():
    rows = [row_of_table(m, a, seed=s) for m, a in (("GVPO", 0.9), ("GRPO", 0.8), ("SFT", 0.95)) for s in range(3)]
    assert [(claim.source, claim.holds) for claim in table1.claims(rows)] == [
        ("paper", True),
        ("paper", True),
        ("ours", False),
    ]
    assert table1.claims(rows[3:]) == []
    for part in (rows, rows[3:], rows[:1], [row_of_table("GVPO", NAN, stopped="update 3")]):
        assert table1.table(part)
        table1.plot(part, Figure())
        assert all(claim.holds is None for claim in table1.claims(part[:1]))
