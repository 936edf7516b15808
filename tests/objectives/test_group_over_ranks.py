"""Groups cut over two real processes: the mean over the ranks is what one process computes of the whole batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gvpo_lightning.objectives import gvpo as objectives
from tests import forked
from tests.objectives.builders import Batch, assert_same, gradient, naive_loss, random_batch

WORLD_SIZE, NUM_ROWS, NOBODY = 2, 11, -1
ROWS = torch.arange(NUM_ROWS)


def whole_batch() -> Batch:
    """Groups of 4, 3 and 1, each with one dropped completion more; the group of 3 has equal rewards."""
    batch = random_batch((4, 3, 1), dropped=1)
    groups, sizes = batch.group_ids.unique(return_counts=True)
    equal = (batch.group_ids == groups[sizes == 4]) & batch.completion_mask.any(1)
    return batch._replace(rewards=torch.where(equal, 0.1, batch.rewards))


# which rank holds each row of the batch
CASES = {
    "cut down the middle": (ROWS >= 6).long(),
    "alternating rows": ROWS % 2,
    "unequal numbers": torch.isin(ROWS, torch.tensor([0, 5, 7])).long(),
    "one row": (ROWS == 4).long(),
    "no rows on one rank": torch.zeros_like(ROWS),
    "no rows on the other": torch.ones_like(ROWS),
    "whole groups": (whole_batch().group_ids == whole_batch().group_ids[0]).long(),
    "no rows at all": torch.full_like(ROWS, NOBODY),
}
NUM_GROUPS = (None, 5)


def work(folder: str, mutate) -> None:
    """One rank: its results for every case, written for the tests to judge."""
    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    if mutate is not None:
        mutate(pytest.MonkeyPatch())
    results = {}
    for case, owners in CASES.items():
        for num_groups in NUM_GROUPS:
            batch = whole_batch()
            part = batch.rows(owners == rank)
            result = objectives.gvpo_loss(*part, num_groups=num_groups, process_group=dist.group.WORLD)
            results[case, num_groups] = {
                "loss": result.loss.detach(),
                "gradient": gradient(result.loss, batch),
                "residuals": result.residuals,
                "metrics": result.metrics,
            }
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def run_ranks(folder: Path, mutate=None) -> list[dict]:
    """The results of every rank; `mutate` is a module's function that spoils the code in each process."""
    forked.run_ranks(folder, WORLD_SIZE, work, str(folder), mutate)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    return run_ranks(tmp_path_factory.mktemp("ranks"))


def mean_over_ranks(ranks: list[dict], key: tuple, read) -> Tensor:
    return sum(read(results[key]) for results in ranks) / WORLD_SIZE


def big_batch(case: str) -> Batch:
    return whole_batch().rows(CASES[case] != NOBODY)


@pytest.mark.parametrize("num_groups", NUM_GROUPS)
@pytest.mark.parametrize("case", CASES)
def test_mean_of_loss_and_gradient_is_the_big_batchs(ranks, case, num_groups):
    batch = whole_batch()
    expected = naive_loss(batch.rows(CASES[case] != NOBODY))
    if num_groups is not None:  # the batch has two groups that count
        expected = expected * 2 / num_groups
    assert_same(mean_over_ranks(ranks, (case, num_groups), lambda r: r["loss"]), expected)
    assert_same(mean_over_ranks(ranks, (case, num_groups), lambda r: r["gradient"]), gradient(expected, batch))


@pytest.mark.parametrize("case", CASES)
def test_residuals_are_those_of_the_big_batch(ranks, case):
    expected = objectives.gvpo_loss(*whole_batch()).residuals
    for rank, results in enumerate(ranks):
        assert_same(results[case, None]["residuals"], expected[CASES[case] == rank])


@pytest.mark.parametrize("case", CASES)
def test_mean_of_the_objectives_terms_is_the_big_batchs(ranks, case):
    metrics = objectives.gvpo_loss(*big_batch(case)).metrics
    for name in ("objective/reward_term", "objective/variance_term", "objective/covariance_term"):
        mean = mean_over_ranks(ranks, (case, None), lambda r, name=name: r["metrics"][name])
        assert_same(mean, metrics[name])


@pytest.mark.parametrize("case", CASES)
def test_groups_are_counted_over_all_ranks_on_each(ranks, case):
    metrics = objectives.gvpo_loss(*big_batch(case)).metrics
    assert float(metrics["group/zero_variance_fraction"]) == (0 if case == "no rows at all" else 0.5)
    for results in ranks:
        for name in ("group/dropped", "group/zero_variance_fraction"):
            assert float(results[case, None]["metrics"][name]) == float(metrics[name]), name
