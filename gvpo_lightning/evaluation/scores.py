"""Completions of benchmark problems: what grades them, how they are recorded as JSON lines, and what they are worth.

The records are what a grade needs, so that grading again generates nothing.
"""

import json
import math
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gvpo_lightning.atomic import write_whole
from gvpo_lightning.evaluation.benchmarks import ProblemBatch
from gvpo_lightning.evaluation.metrics import AverageAtK, MajorityAtK, MeanOverProblems, PassAtK
from gvpo_lightning.rewards import Reward, Rewards
from gvpo_lightning.rewards.maths import plain
from gvpo_lightning.rewards.values import json_line
from gvpo_lightning.rollout.rollout import Rollout

Extractor = Callable[[str], str | None]  # the answer that a completion gives, None where it gives none
Record = dict[str, Any]


def grader(rewards: Rewards | None) -> tuple[str, Reward]:
    """Name and reward.

    Raises:
        ValueError: none, or several: their sum does not say what is right.
    """
    if rewards is None or len(rewards.functions) != 1:
        got = "none" if rewards is None else list(rewards.functions)
        raise ValueError(
            f"Benchmarks need exactly one reward, which is beyond 0.5 for right completions, got {got}: set "
            "model.reward to it, such as gvpo_lightning.rewards.BoxedMath, and model.reward_settings.weights to null."
        )
    return next(iter(rewards.functions.items()))


def answer_extractor(reward: Reward) -> Extractor | None:
    """The reward's own `extract_answer`, if it has one."""
    return getattr(reward, "extract_answer", None)


def reward_facts(rewards: Rewards) -> dict[str, Any]:
    """What scores depend on of rewards and their settings; arguments of those that are shipped alone."""
    functions = {name: _arguments(reward) for name, reward in rewards.functions.items()}
    return {"reward": functions, "reward_settings": asdict(rewards.settings)}


def _arguments(reward: Reward) -> dict[str, Any]:
    if not type(reward).__module__.startswith("gvpo_lightning.rewards."):  # others may hold what is not to be shown
        return {}
    shown = (str, int, float, list, tuple, type(None))
    return {k: v for k, v in vars(reward).items() if isinstance(v, shown) and not k.startswith("_")}


def completion_records(batch: ProblemBatch, rollout: Rollout) -> list[Record]:
    """One dict a completion: problem and sample number, prompt, problem, gold answer, completion, and its grade.

    `reward` is without its weight, None where the reward gave none; `answer` is None, to be found in the completion.
    """
    records = []
    rewards = iter(next(iter(rollout.components.values()), [math.nan] * len(rollout.batch)))  # none where it has raised
    for number, (row, group) in enumerate(zip(batch.rows, rollout.rows(), strict=True), start=batch.first):
        columns = zip(group["completions"], group["token_ids"], group["truncated"], strict=True)
        for sample, (completion, token_ids, truncated) in enumerate(columns):
            reward = next(rewards)
            records.append(
                {
                    "number": number,
                    "sample": sample,
                    "prompt": row["prompt"],
                    "problem": row["problem"],
                    "gold": row["answer"],
                    "completion": completion,
                    "token_ids": token_ids,
                    "num_tokens": len(token_ids),
                    "truncated": truncated,
                    "reward": None if math.isnan(reward) else reward,
                    "answer": None,
                }
            )
    return records


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, and see that they reach the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(map(json_line, records))
        file.flush()
        os.fsync(file.fileno())


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A whole file, in the order of the problems."""
    write_whole(path, "".join(map(json_line, sorted(records, key=lambda record: (record["number"], record["sample"])))))


def read_records(folder: Path) -> dict[str, list[Record]]:
    """The completions in a folder, by benchmark; also those that ranks of a run that ended early have left.

    Each is there once, also where the run ended after its ranks' completions were put together.

    Raises:
        ValueError: there are none, or a line is not one of ours.
    """
    found: dict[str, dict[tuple[int, int], Record]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what no line end follows was cut off
            try:
                record = json.loads(line)
                place = record["number"], record["sample"]
                record["completion"], record["gold"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no completion of an evaluation: {error!r}.") from error
            found.setdefault(path.name.split(".")[0], {})[place] = record
    if not found:
        raise ValueError(f"There are no completions in {folder}: give the `evaluation` folder of a `gvpo test` run.")
    return {name: list(records.values()) for name, records in found.items()}


def by_problem(records: Iterable[Record], num_samples: int | None = None) -> dict[int, list[Record]]:
    """The samples of each problem, in order; a problem whose samples were not all saved is left out.

    All are `num_samples`, or if that is not known as many as any problem has.
    """
    problems: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["number"], record["sample"])):
        problems.setdefault(record["number"], []).append(record)
    num_samples = num_samples or max(map(len, problems.values()), default=0)
    return {number: samples for number, samples in problems.items() if len(samples) == num_samples}


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
