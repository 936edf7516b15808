"""Benchmarks: where a suite's problems are, how many completions each gets, and batches of them for the test loop."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_lightning.data.rows import Row, cut_split, load_splits
from gvpo_lightning.distributed.ranks import DataRanks, rank_share
from gvpo_lightning.rewards.values import is_missing


@dataclass(frozen=True)
class Benchmark:
    """A suite of problems.

    Attributes:
        path: a dataset's hub name, a folder saved with `save_to_disk`, or a .jsonl, .json or .parquet file.
        name: the hub dataset's configuration.
        split: in the datasets library's notation, such as "train[7473:]".
        problem_column, answer_column: the dataset's columns; whatever theirs are, the reward gets them as `problem`
            and `answer`.
        num_samples: completions of every problem.
        count: how many problems there must be; anything else is an error. None = any number.
        answer_after: the answer is what follows this mark in its column, such as GSM8K's "#### ".
        revision: the hub dataset's commit, tag or branch.
    """

    path: str
    name: str | None = None
    split: str = "test"
    problem_column: str = "problem"
    answer_column: str = "answer"
    num_samples: int = 1
    count: int | None = None
    answer_after: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"A benchmark's num_samples must be at least 1, got {self.num_samples}.")


@dataclass
class ProblemSet:
    """Problems with their prompts.

    Attributes:
        name: the benchmark's.
        rows: with `prompt` and the columns for the reward.
        num_samples: completions of each; None = the module's group size.
    """

    name: str
    rows: Sequence[Row]
    num_samples: int | None


def load_problems(name: str, benchmark: Benchmark) -> list[Row]:
    """A `problem` and an `answer` a row.

    Raises:
        ValueError: no such data, split or column; another number of problems; a problem without an answer.
    """
    key = f"data.benchmarks.{name}"
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"{key}: a benchmark's name is a file's too, so letters, digits, _ and - alone; got {name!r}.")
    available = load_splits(benchmark.path, benchmark.name, f"{key}.path", benchmark.revision)
    try:
        dataset = cut_split(available, benchmark.split)
    except ValueError as error:
        raise ValueError(f"{key}.split: {error}") from error
    if benchmark.count is not None and len(dataset) != benchmark.count:
        raise ValueError(
            f"{key} must have {benchmark.count} problems, but {benchmark.split!r} of {benchmark.path!r} has "
            f"{len(dataset)}: scores would not compare. Set the right split or revision, or {key}.count."
        )
    for column in (benchmark.problem_column, benchmark.answer_column):
        if column not in dataset.column_names:
            raise ValueError(f"{key}: {column!r} is not a column of {benchmark.path!r}: it has {dataset.column_names}.")
    problems, answers = dataset[benchmark.problem_column], dataset[benchmark.answer_column]
    return [
        {"problem": problem, "answer": _answer(answer, benchmark.answer_after, f"{key}, problem {number}")}
        for number, (problem, answer) in enumerate(zip(problems, answers, strict=True))
    ]


def _answer(answer: Any, mark: str | None, where: str) -> Any:
    if is_missing(answer) or answer == "" or answer == []:
        raise ValueError(f"{where} has no answer.")
    if mark is None:
        return answer
    _, found, after = str(answer).rpartition(mark)
    if not found:
        raise ValueError(f"{where}: answer_after={mark!r} is not in {str(answer)[-80:]!r}.")
    return after.strip()


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
