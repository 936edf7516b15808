"""What a benchmark's graded completions are worth."""

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
        kwargs: torchmetrics' own.
    """

    def __init__(self, num_samples: int, **kwargs: Any) -> None:
        powers = sorted({1 << power for power in range(num_samples.bit_length())} | {num_samples})
        self.headline = f"avg@{num_samples}" if num_samples > 1 else "pass@1"
        self.metrics: dict[str, MeanOverProblems] = {f"pass@{k}": PassAtK(k, **kwargs) for k in powers}
        if num_samples > 1:
            self.metrics = {self.headline: AverageAtK(num_samples, **kwargs)} | self.metrics
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
    """What an answer is counted as in a majority: its text, a number by value."""
    if answer is None:
        return None
    text = plain(answer)
    try:
        return float(text)
    except ValueError:
        return text


def summarise(records: Iterable[Record], scores: BenchmarkScores, values: dict[str, dict[str, float]]) -> dict:
    """A benchmark's entry in evaluation.json, from the completions of all ranks and `scores.compute()`."""
    records = list(records)
    headline = values[scores.headline]
    return {
        "metric": scores.headline,
        "score": headline["value"],
        "interval": [headline["low"], headline["high"]],
        "problems": len({record["number"] for record in records}),
        "completions": len(records),
        "right": sum(map(is_right, records)),
        "ungraded": sum(record["reward"] is None for record in records),
        "without_answer": sum(record["answer"] is None for record in records),
        "truncated": sum(record["truncated"] for record in records),
        "tokens_mean": sum(record["num_tokens"] for record in records) / len(records),
        "metrics": values,
    }
