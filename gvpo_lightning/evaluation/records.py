"""Completions of benchmark problems as JSON lines: what a grade needs, so that grading again generates nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gvpo_lightning.evaluation.loader import ProblemBatch
from gvpo_lightning.rewards.maths import extract_answer
from gvpo_lightning.rollout.sampling import Rollout

Record = dict[str, Any]


def completion_records(batch: ProblemBatch, rollout: Rollout) -> list[Record]:
    """One dict a completion: problem and sample number, prompt, problem, gold answer, completion, and its grade.

    `reward` is None where the reward gave none; `answer` is what is boxed, as text.
    """
    records = []
    for number, (row, group) in enumerate(zip(batch.rows, rollout.rows(), strict=True), start=batch.first):
        columns = zip(group["completions"], group["token_ids"], group["truncated"], group["rewards"], strict=True)
        for sample, (completion, token_ids, truncated, reward) in enumerate(columns):
            records.append(
                {
                    "number": number,
                    "sample": sample,
                    "prompt": row["prompt"],
                    "problem": row["problem"],
                    "gold": row["answer"],
                    "completion": completion,
                    "num_tokens": len(token_ids),
                    "truncated": truncated,
                    "reward": reward,
                    "answer": extract_answer(completion),
                }
            )
    return records


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, and see that they reach the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A whole file, in the order of the problems; an earlier one is there until the new one is complete."""
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    append_records(new, sorted(records, key=lambda record: (record["number"], record["sample"])))
    new.replace(path)


def read_records(folder: Path) -> dict[str, list[Record]]:
    """The completions in a folder, by benchmark; also those that ranks of a run that ended early have left.

    Raises:
        ValueError: there are none, or a line is not one of ours.
    """
    found: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("*.jsonl"), key=lambda path: path.stat().st_mtime):
        lines = path.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):  # what no line end follows was cut off
            try:
                record = json.loads(line)
                record["number"], record["sample"], record["completion"], record["gold"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no completion of an evaluation: {error!r}.") from error
            found.setdefault(path.name.split(".")[0], []).append(record)
    if not found:
        raise ValueError(f"There are no completions in {folder}: give the `evaluation` folder of a `gvpo test` run.")
    return found


def by_problem(records: Iterable[Record]) -> dict[int, list[Record]]:
    """The samples of each problem, in order; a problem whose samples were not all saved is left out."""
    problems: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record["number"], record["sample"])):
        problems.setdefault(record["number"], []).append(record)
    most = max(map(len, problems.values()), default=0)
    return {number: samples for number, samples in problems.items() if len(samples) == most}
