"""Distances between the policies of `uniqueness`: measured in processes of their own, and read from its rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Row
from benchmarks.paper.prepare import Configs, run_apart, run_gvpo, setting
from benchmarks.paper.tables import estimate, group_by

SPLITS = ("training", "held-out")
PROMPTS, COMPLETIONS = 32, 4  # that policies are compared on: of each split, and of each prompt


def measure(
    configs: Configs, groups: dict[str, list[str]], beta: float, answers: str | None, jobs: int
) -> dict[str, Any]:
    """By split, what `PolicyDistances` says of the groups on its first prompts."""
    outputs = {split: Path(groups["starts"][0]).parent / split for split in SPLITS}
    tasks = []
    for split, folder in outputs.items():
        settings = {"output": f"{folder}.json", "groups": groups, "completions": COMPLETIONS, "answers": answers}
        meter = {"class_path": "benchmarks.paper.distances.PolicyDistances", "init_args": settings}
        role = {"training": "train", "held-out": "validation"}[split]
        told = {
            "model.beta": beta,
            "data.validation_split": setting(configs, f"data.{role}_split", role),
            "data.batch_size": PROMPTS,
            "trainer.limit_val_batches": 1,
            "trainer.inference_mode": False,  # `score` takes no inference tensors
            "trainer.callbacks+": json.dumps(meter),
            "trainer.default_root_dir": str(folder),
        }
        tasks.append((run_gvpo, ("validate", configs, told, folder.with_suffix(".log"))))
    run_apart(tasks, jobs)
    return {split: json.loads(folder.with_suffix(".json").read_text()) for split, folder in outputs.items()}


def add_distances(rows: list[Row], starts: list[str], split: str, found: dict[str, Any]) -> None:
    """Each row's `distances` on a split's prompts, from what `measure` has found.

    `to` the others of its method, a list of [start, sampler, nats], and `start_to`, from its start to all starts;
    `optimum` and `start_optimum` are the distances to the closed form, or null.
    """
    for (method,), same in group_by([row for row in rows if row["stopped"] is None], "method").items():
        names = [(row["labels"]["start"], row["labels"]["sampler"]) for row in same]
        for number, row in enumerate(same):
            start = starts.index(row["settings"]["model.policy"])
            row.setdefault("distances", {})[split] = {
                "to": [[*name, kl] for name, kl in zip(names, found[method]["kl"][number], strict=True)],
                "start_to": found["starts"]["kl"][start],
                "optimum": found[method]["optimum"][number],
                "start_optimum": found["starts"]["optimum"][start],
            }


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    """The rows of each method that have been compared."""
    return {method: same for (method,), same in group_by([r for r in rows if "distances" in r], "method").items()}


def pairs(rows: list[Row], split: str, same_start: bool, same_sampler: bool) -> list[float]:
    """KL of all pairs of different policies of one method, with the same start or sampler or another one."""
    return [
        float(kl)
        for row in rows
        for start, sampler, kl in row["distances"][split]["to"]
        if (start, sampler) != (row["labels"]["start"], row["labels"]["sampler"])
        and (start == row["labels"]["start"]) == same_start
        and (sampler == row["labels"]["sampler"]) == same_sampler
    ]


def among(rows: list[Row], samplers: Sequence[str]) -> list[Row]:
    """The rows with one of these samplers, with their distances to each other alone."""
    found = []
    for row in (row for row in rows if row["labels"]["sampler"] in samplers):
        kept = {
            split: of | {"to": [other for other in of["to"] if other[1] in samplers]}
            for split, of in row["distances"].items()
        }
        found.append(row | {"distances": kept})
    return found


def all_pairs(rows: list[Row], split: str) -> list[float]:
    """KL of all pairs of different policies of one method."""
    return [kl for same in ((True, False), (False, True), (False, False)) for kl in pairs(rows, split, *same)]


def start_pairs(rows: list[Row], split: str) -> list[float]:
    """KL of all pairs of different starts, from each that a row began at.

    `start_to` is of all starts, those of stopped runs too; only a start's distance to itself is exactly 0, unmeasured.
    """
    by_start = {row["labels"]["start"]: row["distances"][split]["start_to"] for row in rows}
    return [float(kl) for kls in by_start.values() for kl in kls if kl != 0.0]


def to_optimum(rows: list[Row], split: str, name: str = "optimum") -> list[float]:
    """KL of all policies to the closed form; empty where it is not known."""
    return [row["distances"][split][name] for row in rows if row["distances"][split][name] is not None]


def shown(values: list[float]) -> str:
    """Mean and largest."""
    return f"{estimate(values).mean:.4f} ({max(values):.4f})" if values else ""
