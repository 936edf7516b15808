"""`ProblemLoader`: batches of problems for Lightning's test loop, each problem on one rank alone."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gvpo_lightning.data.rows import Row
from gvpo_lightning.distributed.ranks import DataRanks, rank_share
from gvpo_lightning.evaluation.benchmarks import ProblemSet


@dataclass
class ProblemBatch:
    """Some problems of one set; iterating gives their rows.

    Attributes:
        name: the set's.
        first: the number of the first of them in the set.
        rows: with `prompt` and the columns for the reward.
        num_samples: completions of each; None = the module's group size.
    """

    name: str
    first: int
    rows: list[Row]
    num_samples: int | None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def check_shares(sets: Sequence[ProblemSet], size: int) -> None:
    """Raise ValueError where one of `size` ranks has no problem: Lightning would skip it, and the others would wait."""
    for rank in range(size):
        if not any(rank_share(len(problems.rows), rank, size) for problems in sets):
            counts = {problems.name: len(problems.rows) for problems in sets}
            raise ValueError(f"{size} ranks can't share {counts} problems, one would have none: use fewer devices.")


class ProblemLoader:
    """Batches of problems, set by set; ranks have different problems, and may have different numbers of batches.

    Lightning's sampler would give ranks equally many problems by giving some twice, and means would count them twice.
    It leaves this loader alone, since it is no torch DataLoader.

    Args:
        sets: what is evaluated.
        batch_size: the most problems in one batch.
        ranks: who share the problems.
    """

    def __init__(self, sets: Sequence[ProblemSet], batch_size: int, ranks: DataRanks) -> None:
        self.sets, self.batch_size, self.ranks = sets, batch_size, ranks

    def __len__(self) -> int:
        shares = (self.ranks.share(len(problems.rows)) for problems in self.sets)
        return sum(math.ceil(len(share) / self.batch_size) for share in shares)

    def __iter__(self) -> Iterator[ProblemBatch]:
        for problems in self.sets:
            mine = self.ranks.share(len(problems.rows))
            for start in range(0, len(mine), self.batch_size):
                numbers = mine[start : start + self.batch_size]
                rows = [dict(problems.rows[number]) for number in numbers]
                yield ProblemBatch(problems.name, numbers.start, rows, problems.num_samples)
