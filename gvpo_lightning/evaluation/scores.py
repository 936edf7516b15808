"""What a benchmark's graded completions are worth."""

import math
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from gvpo_lightning.evaluation.metrics import AverageAtK, MajorityAtK, MeanOverProblems, PassAtK
from gvpo_lightning.evaluation.records import Record
from gvpo_lightning.rewards.maths import plain


class BenchmarkScores:
    """The metrics of one benchmark: avg@n of its n completions a problem, pass@k and maj@k for powers of two up to n.

    Args:
        num_samples: completions of every problem.
        has_answers: whether the completions' answers are known; without them there is no maj@k.
        kwargs: torchmetrics' own.
    """

    def __init__(self, num_samples: int, has_answers: bool = True, **kwargs: Any) -> None:
        powers = sorted({1 << power for power in range(num_samples.bit_length())} | {num_samples})
        self.has_answers = has_answers
        self.headline = f"avg@{num_samples}" if num_samples > 1 else "pass@1"
        self.metrics: dict[str, MeanOverProblems] = {f"pass@{k}": PassAtK(k, **kwargs) for k in powers}
        if num_samples > 1:
            self.metrics = {self.headline: AverageAtK(num_samples, **kwargs)} | self.metrics
        if num_samples > 1 and has_answers:
            self.metrics |= {f"maj@{k}": MajorityAtK(k, **kwargs) for k in powers[1:]}

    def update(self, samples: list[Record]) -> None:
        """Count one problem's completions; what the reward failed on is wrong."""
        correct = torch.tensor([is_right(record) for record in samples])
        answers = [vote(record["answer"]) for record in samples]
        for metric in self.metrics.values():
            if isinstance(metric, MajorityAtK):
                metric.update(correct, answers)
            else:
                metric.update(correct)

    def compute(self) -> dict[str, dict[str, float]]:
        """Value and interval of each metric; every rank must call this."""
        found = {}
        for name, metric in self.metrics.items():
            low, high = metric.interval()
            found[name] = {"value": float(metric.compute()), "low": low, "high": high}
        return found


def is_right(record: Record) -> bool:
    """A reward beyond a half counts as right."""
    return record["reward"] is not None and record["reward"] > 0.5


def vote(answer: str | None) -> Hashable | None:
    """What an answer is counted as in a majority: its text, a number by value; None where it is empty."""
    if not answer or not (text := plain(answer)):
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return text if math.isnan(number) else number  # which would equal nothing, not even itself


def summarise(
    records: Iterable[Record], scores: BenchmarkScores, values: dict[str, dict[str, float]], all_problems: int | None
) -> dict[str, Any]:
    """A benchmark's entry in evaluation.json, from the completions of all ranks and `scores.compute()`.

    `all_problems` are those that the benchmark has, None where that is not known.
    """
    records = list(records)
    headline = values[scores.headline]
    return {
        "metric": scores.headline,
        "score": headline["value"],
        "interval": [headline["low"], headline["high"]],
        "problems": len({record["number"] for record in records}),
        "all_problems": all_problems,
        "completions": len(records),
        "right": sum(map(is_right, records)),
        "ungraded": sum(record["reward"] is None for record in records),
        "without_answer": sum(vote(r["answer"]) is None for r in records) if scores.has_answers else None,
        "truncated": sum(record["truncated"] for record in records),
        "tokens_mean": sum(record["num_tokens"] for record in records) / len(records),
        "metrics": values,
    }
