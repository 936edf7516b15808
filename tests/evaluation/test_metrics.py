"""The metrics against enumeration, their intervals against simulation, and both over real ranks."""

import itertools
import json
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gvpo_lightning.evaluation.metrics import (
    AverageAtK,
    MajorityAtK,
    PassAtK,
    Z,
    majority,
    pass_at_k,
    wilson_interval,
)
from tests.forked import run_ranks


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1), (8, 0)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    right = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(right, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, abs=1e-12)
    assert 0 < pass_at_k(10**5, 1, 1) < 2e-5


def test_majority_breaks_ties_evenly():
    assert majority([True, False, False], ["a", "b", "b"]) == 0
    assert majority([True, False], ["a", "b"]) == 0.5
    assert majority([True, False, False], ["a", "b", "c"]) == pytest.approx(1 / 3)
    assert majority([True, False, False, False], ["a", None, None, None]) == 1  # only answers vote
    assert majority([False, False], [None, None]) == 0
    assert majority([True, False, True], ["1/2", "1/2", "b"]) == 0.5  # graded differently: it is right half the time


def test_majority_at_k_uses_every_vote_once():
    metric = MajorityAtK(2)
    metric.update(torch.tensor([1, 1, 0, 0, 1]), ["a", "a", "b", "c", "a"])  # right, wrong; the fifth is left over
    assert float(metric.compute()) == 0.5


def test_average_of_more_completions_than_k_uses_all():
    metric = AverageAtK(2)
    metric.update(torch.tensor([1, 0, 0, 0]))
    assert float(metric.compute()) == 0.25


@pytest.mark.parametrize("kind", [PassAtK, AverageAtK, MajorityAtK])
def test_too_few_completions_are_refused(kind):
    arguments = [[None] * 3] if kind is MajorityAtK else []
    with pytest.raises(ValueError, match=r"k=4\) needs a vector of at least 4 completions a problem, got shape \(3,\)"):
        kind(4).update(torch.tensor([1, 0, 1]), *arguments)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        kind(0)


def test_single_samples_have_wilsons_own_interval():
    p = 7 / 30
    for end in wilson_interval(total=7, squares=7, problems=30, draws=30):  # where the mean is z standard errors away
        assert (p - end) ** 2 == pytest.approx(Z * Z * end * (1 - end) / 30, rel=1e-9)
    assert wilson_interval(0, 0, 30, 960) == (0, pytest.approx(0.113513, abs=1e-5))
    assert wilson_interval(30, 30, 30, 960) == (pytest.approx(0.886487, abs=1e-5), 1)


def test_interval_is_between_that_of_the_problems_and_that_of_the_draws():
    wide, narrow = wilson_interval(15, 15, 30, 30), wilson_interval(480, 480, 960, 960)
    low, high = wilson_interval(15, 9, 30, 960)
    assert wide[0] < low < narrow[0] < narrow[1] < high < wide[1]
    assert wilson_interval(15, 7.5, 30, 45) == wilson_interval(22.5, 22.5, 45, 45)  # at most the draws
    assert wilson_interval(15, 7.5, 30, 960) == wilson_interval(30, 30, 60, 60)  # and twice the problems


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [(0.3, 1.5), (1.0, 1.0), (20.0, 20.0), (0.1, 5.0), (5.0, 0.2), (0.02, 0.5), (0.1, 1.0), (0.05, 5.0)],
)
@pytest.mark.parametrize(("problems", "samples"), [(30, 32), (83, 1), (83, 32), (200, 4)])
def test_intervals_cover_the_truth(alpha, beta, problems, samples):
    """Problems whose chances are drawn from a beta distribution, with the mean alpha / (alpha + beta)."""
    generator = torch.Generator().manual_seed(0)
    runs = 3000
    gamma = [
        torch._standard_gamma(torch.full((runs, problems), a, dtype=torch.float64), generator) for a in (alpha, beta)
    ]
    chances = gamma[0] / (gamma[0] + gamma[1])
    counts = torch.binomial(torch.full_like(chances, samples), chances, generator)
    scores = counts / samples
    truth, hits = alpha / (alpha + beta), 0
    for row in scores:
        low, high = wilson_interval(float(row.sum()), float((row * row).sum()), problems, problems * samples)
        hits += low <= truth <= high
    assert 0.93 < hits / runs <= 1  # 95% wanted


def problems_of(count: int) -> list[tuple[list[bool], list[str]]]:
    rng = random.Random(count)
    answers = [[rng.choice("abc") for _ in range(8)] for _ in range(count)]
    return [([answer == "a" for answer in row], row) for row in answers]


def measure(problems) -> dict:
    metrics = {"pass": PassAtK(4), "avg": AverageAtK(8), "maj": MajorityAtK(4)}
    for right, answers in problems:
        metrics["pass"].update(torch.tensor(right))
        metrics["avg"].update(torch.tensor(right))
        metrics["maj"].update(torch.tensor(right), answers)
    return {name: [float(metric.compute()), *metric.interval()] for name, metric in metrics.items()}


def measure_on_rank(folder: str, shares: list[int]) -> None:
    """One rank's problems; what all ranks' are worth is written by each."""
    os.environ["RANK"] = os.environ["LOCAL_RANK"]
    warnings.simplefilter("ignore")  # torchmetrics warns of ranks without updates
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = problems_of(sum(shares))[sum(shares[:rank]) :][: shares[rank]]
    Path(folder, f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(measure(mine)))
    dist.destroy_process_group()


@pytest.mark.parametrize("shares", [[3, 4], [0, 7]])
def test_two_ranks_with_different_numbers_of_problems_measure_what_one_does(tmp_path, shares):
    run_ranks(tmp_path, 2, measure_on_rank, str(tmp_path), shares)
    expected = measure(problems_of(7))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, abs=1e-12), name
