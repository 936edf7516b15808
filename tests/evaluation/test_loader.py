"""Every problem is on one rank, once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gvpo_lightning.data.rows import rows_of
from gvpo_lightning.distributed.ranks import DataRanks
from gvpo_lightning.evaluation.benchmarks import Benchmark, ProblemLoader, ProblemSet, check_shares


@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=3), size=st.integers(1, 7), batch_size=st.integers(1, 9)
)
def test_problems_are_shared_without_repeats(counts, size, batch_size):
    sets = [
        ProblemSet(f"set{n}", [{"prompt": f"{n}:{i}"} for i in range(count)], n + 1) for n, count in enumerate(counts)
    ]
    found = []
    for rank in range(size):
        loader = ProblemLoader(sets, batch_size, DataRanks(rank, size))
        batches = list(loader)
        assert len(batches) == len(loader)
        for batch in batches:
            assert 1 <= len(batch.rows) <= batch_size
            rows = rows_of(batch)
            number = int(batch.name[3:])
            assert batch.num_samples == number + 1
            assert [row["prompt"] for row in rows] == [f"{number}:{batch.first + i}" for i in range(len(rows))]
            found += [row["prompt"] for row in rows]
    assert sorted(found) == sorted(row["prompt"] for problems in sets for row in problems.rows)


def test_ranks_without_a_problem_are_refused():
    few, more = (ProblemSet(name, [{"prompt": "p"}] * count, 1) for name, count in (("few", 1), ("more", 2)))
    check_shares([few, more], 2)
    with pytest.raises(ValueError, match=r"3 ranks can't share {'few': 1, 'more': 2} problems.*use fewer devices"):
        check_shares([few, more], 3)


def test_no_completions_a_problem_are_refused():
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        Benchmark("path", num_samples=0)
