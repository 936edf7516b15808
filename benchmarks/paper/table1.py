"""Table 1 of the paper: GVPO beside the methods that it is compared with, each at its own best learning rate."""

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.paper.cells import Cell, Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.tables import (
    COUNTDOWN,
    Claim,
    count_stopped,
    decide,
    end,
    estimate,
    group_by,
    markdown,
    paired_difference,
)

GRID = (1e-4, 3e-4, 1e-3, 3e-3)
TUNING_SEED = 100  # none of the seeds that are reported
SEEDS = (0, 1, 2, 3, 4)
UPDATES = 80
OF_THE_PAPER = ("GRPO", "Dr.GRPO")  # methods that the paper says GVPO is above
ACCURACY = end("accuracy")


def run(options: Options, execute: Execute) -> None:
    """The grid for each method and task on a seed of its own, then every seed at the best learning rate."""
    tuned = execute(
        [
            make_cell(options, task, method, learning_rate, TUNING_SEED, phase="tuning")
            for task in options.tasks("sums", "countdown")
            for method in METHODS
            for learning_rate in options.grid(GRID)
        ]
    )
    execute(
        [
            make_cell(options, task, method, best_learning_rate(found), seed, phase="final")
            for (task, method), found in group_by(tuned, "task", "method").items()
            for seed in options.seeds or SEEDS
        ]
    )


def make_cell(options: Options, task: str, method: str, learning_rate: float, seed: int, phase: str) -> Cell:
    """One run of a method."""
    labels = {"phase": phase, "task": task, "method": method, "learning_rate": learning_rate}
    configs = options.tasks("sums", "countdown")[task]
    return options.cell(configs, labels, METHODS[method], seed, updates=UPDATES, learning_rate=learning_rate)


def best_learning_rate(rows: Sequence[Row]) -> float:
    """That of the highest accuracy; of equal ones the smaller. A run without a finite one is the worst."""

    def rank(row: Row) -> tuple[float, float]:
        accuracy = ACCURACY(row)
        return accuracy if math.isfinite(accuracy) else -math.inf, -row["labels"]["learning_rate"]

    rate: float = max(rows, key=rank)["labels"]["learning_rate"]
    return rate


def finals(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """The reported runs by task and method."""
    found: dict[str, dict[str, list[Row]]] = {}
    for (task, method), same in group_by(of_phase(rows, "final"), "task", "method").items():
        found.setdefault(task, {})[method] = same
    return found


def of_phase(rows: list[Row], phase: str) -> list[Row]:
    """The runs that chose the learning rates ("tuning"), or those that are reported ("final")."""
    return [row for row in rows if row["labels"]["phase"] == phase]


def table(rows: list[Row]) -> str:
    """The methods on each task, and the grid beneath."""
    lines: list[list[Any]] = []
    for task, methods in finals(rows).items():
        start = next(iter(methods.values()))[0]["start"]
        lines.append([task, "base", "", f"{start['accuracy']:.3f}", "", "0", f"{start['entropy']:.3f}"])
        for method, own in methods.items():
            difference: Any = ""
            if method != "GVPO" and "GVPO" in methods:
                difference = paired_difference(methods["GVPO"], own, ACCURACY)
            accuracy, *others = [estimate([end(name)(row) for row in own]) for name in ("accuracy", "kl", "entropy")]
            rate = f"{own[0]['labels']['learning_rate']:g}{edge(rows, task, method, own)}"
            lines.append([task, method, rate, f"{accuracy}{count_stopped(own)}", difference, *others])
    header = ["task", "method", "learning rate", "accuracy", "GVPO minus it", "KL to the base", "entropy"]
    text = markdown(header, lines)
    return f"{text}\n\nThe grid (accuracy on the tuning seed, {TUNING_SEED}):\n\n{grid_table(rows)}"


def edge(rows: list[Row], task: str, method: str, own: list[Row]) -> str:
    """A mark where a learning rate is the grid's smallest or largest, beyond which a better one may lie."""
    tuned = [row["labels"] for row in of_phase(rows, "tuning")]
    rates = [labels["learning_rate"] for labels in tuned if (labels["task"], labels["method"]) == (task, method)]
    return " (the grid's edge)" if rates and own[0]["labels"]["learning_rate"] in (min(rates), max(rates)) else ""


def grid_table(rows: list[Row]) -> str:
    """Accuracy of every learning rate that was tried."""
    tuning = of_phase(rows, "tuning")
    rates = sorted({row["labels"]["learning_rate"] for row in tuning})
    lines = []
    for (task, method), of_method in group_by(tuning, "task", "method").items():
        values = {row["labels"]["learning_rate"]: estimate([ACCURACY(row)]) for row in of_method}
        lines.append([task, method, *(values.get(rate, "") for rate in rates)])
    return markdown(["task", "method", *(f"{rate:g}" for rate in rates)], lines)


def claims(rows: list[Row]) -> list[Claim]:
    """GVPO above the base, and above each of the others."""
    made = []
    for task, methods in finals(rows).items():
        if "GVPO" not in methods:
            continue
        gain = estimate([ACCURACY(row) - row["start"]["accuracy"] for row in methods["GVPO"]])
        made.append(Claim("GVPO ends above the base", f"{task}: by {gain}", decide(gain)))
        for method in (name for name in methods if name != "GVPO"):
            difference = paired_difference(methods["GVPO"], methods[method], ACCURACY)
            ours, theirs = (estimate([ACCURACY(row) for row in methods[name]]) for name in ("GVPO", method))
            measured = f"{task}: {ours} against {theirs}, difference {difference}"
            if method in OF_THE_PAPER:
                made.append(Claim(f"GVPO ends above {method}", measured, decide(difference)))
            else:
                made.append(Claim(f"Compared with {method}: GVPO ends above it", measured, decide(difference), "ours"))
    return made


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy with intervals, a panel a task."""
    found = finals(rows)
    for (task, methods), axis in zip(
        found.items(), figure.subplots(1, max(1, len(found)), squeeze=False)[0], strict=False
    ):
        values = {name: estimate([ACCURACY(row) for row in own]) for name, own in methods.items()}
        axis.bar(
            list(values), [v.mean for v in values.values()], yerr=[v.half or 0 for v in values.values()], capsize=4
        )
        first = next(iter(methods.values()))[0]
        axis.axhline(first["start"]["accuracy"], color="black", linestyle=":", label="base")
        predicted = methods["GVPO"][0]["predicted"] if "GVPO" in methods else None
        if predicted is not None:
            axis.axhline(predicted, color="black", linestyle="--", label="GVPO's optimum")
        axis.set(title=task, ylabel="accuracy, held-out prompts", ylim=(0, 1.05))
        axis.legend(fontsize=8)


BETAS = ", ".join(f"{name} {settings['model.beta']:g}" for name, settings in METHODS.items() if name != "SFT")
ABOUT = f"""
Every method gets the same prompts, {UPDATES} optimizer updates of 8 prompts with 8 completions that it samples itself
(four updates a rollout), AdamW without decay, gradients clipped at norm 1, and a learning rate that falls linearly to
nearly zero; it starts at the best of {", ".join(f"{rate:g}" for rate in GRID)} for each method and task, chosen by one
run on seed {TUNING_SEED}, which is not among the reported ones; where the best is the grid's smallest or largest, the
table says so. SFT trains on the completions that are right, DPO on all pairs of a right and a wrong one. The strength
of the pull to the frozen reference is each method's usual one ({BETAS}), not tuned. The paper says that GVPO ends above
the base, {" and ".join(OF_THE_PAPER)}; with the other methods it is compared here. `sums` is the demo's task.
{COUNTDOWN}
"""
EXPERIMENT = Experiment("table1", "Table 1: GVPO and its alternatives", ABOUT, run, table, claims, plot)
