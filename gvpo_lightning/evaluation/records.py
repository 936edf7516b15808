"""Completions of benchmark problems as JSON lines: what a grade needs, so that grading again generates nothing."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gvpo_lightning.atomic import write_whole
from gvpo_lightning.evaluation.grading import Extractor
from gvpo_lightning.evaluation.loader import ProblemBatch
from gvpo_lightning.rollout.rollout import Rollout

Record = dict[str, Any]


def completion_records(batch: ProblemBatch, rollout: Rollout, extract: Extractor | None) -> list[Record]:
    """One dict a completion: problem and sample number, prompt, problem, gold answer, completion, and its grade.

    `reward` is without its weight, None where the reward gave none; `answer` is what `extract` finds.
    """
    records = []
    (component,) = rollout.components.values()
    rewards = iter(component)
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
                    "answer": None if extract is None else extract(completion),
                }
            )
    return records


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, and see that they reach the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(_line(record) for record in records)
        file.flush()
        os.fsync(file.fileno())


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A whole file, in the order of the problems."""
    write_whole(path, "".join(map(_line, sorted(records, key=lambda record: (record["number"], record["sample"])))))


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
