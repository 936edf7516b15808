"""pass@k, avg@k and maj@k as torchmetrics metrics: one update a problem, means over the problems of all ranks."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

Z = 1.959963984540054  # of a standard normal, 95% lie within


class MeanOverProblems(Metric):
    """The mean of a score in [0, 1] over problems, each of which `update` is called for once, on any one rank.

    The state is sums, so ranks may have different numbers of problems, also none; every rank must call `compute` and
    `interval`. Both are NaN without problems.

    Args:
        k: completions that the score is of; every problem needs at least as many.
        kwargs: torchmetrics' own, such as `process_group`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    squares: Tensor
    problems: Tensor
    draws: Tensor

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"{type(self).__name__}'s k must be at least 1, got {k}.")
        self.k = k
        for name in ("total", "squares", "problems", "draws"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, score: float, num_draws: int) -> None:
        # not in place: Lightning's evaluation makes inference tensors
        self.total = self.total + score
        self.squares = self.squares + score * score
        self.problems = self.problems + 1
        self.draws = self.draws + num_draws

    def _check(self, correct: Tensor) -> Tensor:
        if correct.ndim != 1 or len(correct) < self.k:
            raise ValueError(
                f"{type(self).__name__}(k={self.k}) needs a vector of at least {self.k} completions a problem, got "
                f"shape {tuple(correct.shape)}: sample more, or take a smaller k."
            )
        return correct.bool()

    def compute(self) -> Tensor:
        """The mean, a scalar."""
        return self.total / self.problems

    def interval(self) -> tuple[float, float]:
        """A 95% confidence interval of the mean, for other problems of the same kind and other samples."""
        # torchmetrics does this around `compute` alone
        with self.sync_context(should_sync=self._to_sync, should_unsync=self._to_sync):
            state = (self.total, self.squares, self.problems, self.draws)
            return wilson_interval(*(float(value) for value in state))


class PassAtK(MeanOverProblems):
    """Chance that of k completions at least one is right, without bias: 1 − C(n−c, k) / C(n, k) (Chen et al. 2021)."""

    def update(self, correct: Tensor) -> None:
        """One problem's completions, (num_samples,) of 0 and 1 or bool."""
        correct = self._check(correct)
        self._add(pass_at_k(len(correct), int(correct.sum()), self.k), len(correct) // self.k)


class AverageAtK(MeanOverProblems):
    """Share of right completions; of more than k all are used, whose mean estimates the same."""

    def update(self, correct: Tensor) -> None:
        """One problem's completions, (num_samples,) of 0 and 1 or bool."""
        correct = self._check(correct)
        self._add(float(correct.double().mean()), len(correct))


class MajorityAtK(MeanOverProblems):
    """Chance that the most frequent answer of k completions is right; of n there are n // k such votes.

    Completions without an answer do not vote. Of answers with equally many votes each is taken equally often.
    """

    def update(self, correct: Tensor, answers: Sequence[Hashable | None]) -> None:
        """One problem's completions, (num_samples,) of 0 and 1 or bool, and their answers, None where there is none."""
        correct = self._check(correct)
        if len(answers) != len(correct):
            raise ValueError(f"MajorityAtK needs an answer a completion, {len(correct)}, got {len(answers)}.")
        right = correct.tolist()
        starts = range(0, len(right) - self.k + 1, self.k)
        votes = [majority(right[start : start + self.k], answers[start : start + self.k]) for start in starts]
        self._add(sum(votes) / len(votes), len(votes))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """1 − C(n−c, k) / C(n, k), in whole numbers until the last division."""
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(right: Sequence[bool], answers: Sequence[Hashable | None]) -> float:
    """Chance that the most frequent answer is right, ties broken by lot; 0 where there are no answers."""
    votes: dict[Hashable, list[bool]] = {}
    for is_right, answer in zip(right, answers, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(is_right)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    # one answer may be written in ways that are graded differently
    leaders = [sum(of_answer) / most for of_answer in votes.values() if len(of_answer) == most]
    return sum(leaders) / len(leaders)


def wilson_interval(total: float, squares: float, problems: float, draws: float) -> tuple[float, float]:
    """Wilson's 95% interval of a mean of scores in [0, 1], with the sample size that their spread is worth.

    With scores of 0 and 1 that is the number of problems, and the interval Wilson's own. Scores between are less
    spread: the size is p (1 − p) / (variance / problems), at most the number of independent draws. Few problems may
    look less spread than they are, where a rare one with a high score is missing: so two are added that are as spread
    as can be, and the size is at most twice the number of problems. Without that 30 problems with 32 completions each
    may be covered 84% of the time instead of 95%.

    Args:
        total, squares: sums of the scores and of their squares.
        problems, draws: how many scores there are, and how many independent draws they are made from.
    """
    if not problems:
        return math.nan, math.nan
    mean = min(max(total / problems, 0.0), 1.0)
    binary = mean * (1 - mean)
    variance = (squares - problems * mean * mean + 2 * binary) / (problems + 2)
    size = min(problems * binary / variance, draws, 2 * problems) if variance > 0 else problems
    size = max(size, problems)
    centre = (mean + Z * Z / (2 * size)) / (1 + Z * Z / size)
    half = Z / (1 + Z * Z / size) * math.sqrt(binary / size + Z * Z / (4 * size * size))
    # exact at the ends, where rounding may leave 1e-17
    return (0.0 if mean == 0 else centre - half), (1.0 if mean == 1 else centre + half)
