"""What counts as diverged, and what follows for the ablation's claims."""

import pytest

from benchmarks.paper import ablation
from benchmarks.paper.divergence import RULE, best_accuracy, divergence, has_learned, largest_of
from benchmarks.paper.tables import curve


def a_row(accuracies, *, kl=1.0, stopped=None, seed=0, **labels):
    at = [{"accuracy": value, "kl": kl, "entropy": 0.5, "length": 3.0} for value in accuracies]
    evaluations = [{"update": 10 * number, **values} for number, values in enumerate(at[1:-1], 1)]
    trace = [{"update": 10 * (len(at) - 1), "log_ratio_max": 2.0, "gradient_norm": 1.0}]
    measured = {"start": at[0], "end": at[-1], "evaluations": evaluations, "trace": trace}
    return {"labels": labels, "seed": seed, "stopped": stopped, "skipped_updates": 0} | measured


@pytest.mark.parametrize(
    ("row", "diverged", "learned"),
    [
        (a_row([0.4, 0.8, 0.9]), False, True),
        (a_row([0.4, 0.8, 0.41]), False, True),
        (a_row([0.4, 0.8, 0.39]), True, True),
        (a_row([0.4, 0.45, 0.19]), True, False),
        (a_row([0.4, 0.8, 0.9], kl=5.9), False, True),
        (a_row([0.4, 0.8, 0.9], kl=6.1), True, True),
        (a_row([0.4, 0.8, 0.9], stopped="update 20: 6 updates"), True, True),
    ],
)
def test_divergence_follows_the_bounds_that_are_stated(row, diverged, learned):
    assert (divergence(row) is not None, has_learned(row)) == (diverged, learned)


def test_best_accuracy_may_be_on_the_way():
    assert best_accuracy(a_row([0.4, 0.9, 0.5])) == 0.9
    assert best_accuracy(a_row([0.4, 0.3, 0.2])) == 0.4


def test_divergence_with_negative_rewards_is_losing_much_of_their_size():
    assert divergence(a_row([-0.9, -0.5, -0.6])) is None
    assert divergence(a_row([-1.0, -0.01, -0.02])) is None
    assert divergence(a_row([-0.5, -0.4, -0.7])) is not None


def test_runs_without_an_end_or_a_finite_one_have_diverged():
    stopped = a_row([0.4, 0.8, 0.9], stopped="update 20: 6 updates") | {"end": None}
    assert (divergence(stopped), best_accuracy(stopped)) == ("stopped", 0.8)
    assert divergence(a_row([0.4, 0.8, float("nan")])) == "not finite"
    assert divergence(a_row([0.4, 0.8, None])) == "not finite"  # as files have it
    assert best_accuracy(a_row([0.4, 0.8, None, None])) == 0.8
    assert curve([stopped, a_row([0.2, 0.4, 0.5])], "accuracy") == pytest.approx({0: 0.3, 10: 0.6, 20: 0.5})
    assert "stopped (6 updates in a row" in RULE
    assert largest_of({"trace": [{"a": 1.0}, {"a": float("nan")}, {"a": None}]}, "a") == 1.0


def test_the_paper_says_nothing_of_the_frozen_reference():
    labels = {"task": "sums", "learning_rate": 1e-3, "variant": "GVPO"}
    rows = [a_row([0.4, 0.9], seed=s, reference=r, **labels) for r in ("previous", "frozen") for s in (0, 1)]
    assert [claim.source for claim in ablation.claims(rows)] == ["paper", "ours"]
    assert [claim.holds for claim in ablation.claims(rows[:1])] == [None]


def test_claims_need_all_seeds_to_agree():
    labels = {"task": "sums", "learning_rate": 1e-3, "reference": "previous"}
    healthy, fell, never = [0.4, 0.8, 0.9], [0.4, 0.8, 0.1], [0.4, 0.4, 0.1]
    rows = [
        a_row(accuracies, seed=seed, variant=variant, **labels)
        for variant, runs in (
            ("GVPO", (healthy, healthy)),
            ("without Var", (fell, never)),
            ("without Cov", (healthy, fell)),
            ("without both", (never, never)),
        )
        for seed, accuracies in enumerate(runs)
    ]
    claims = ablation.claims(rows)
    assert [claim.holds for claim in claims] == [True, True, None, False]
    assert "2 of 2" in claims[1].measured
    assert ablation.table(rows).count("\n") == 5


def test_curves_are_means_of_the_runs_that_were_still_there():
    rows = [a_row([0.4, 0.8, 0.9]), a_row([0.2, 0.3])]
    assert curve(rows, "accuracy") == pytest.approx({0: 0.3, 10: 0.55, 20: 0.9})
