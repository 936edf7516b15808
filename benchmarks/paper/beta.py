"""Figure 2 of the paper: how much depends on beta."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.tables import (
    Claim,
    Estimate,
    all_hold,
    count_stopped,
    decide_below,
    decide_within,
    draw_line,
    end,
    estimate,
    group_by,
    markdown,
    paired_difference,
    show_predicted,
)

BETAS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0)
KL_COEFFICIENTS = (0.01, 0.04, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
UPDATES = 120
LEARNING_RATES = {"GVPO": 1e-3, "GRPO": 1e-3}
LARGEST_ROBUST, LITTLE = 0.5, 0.05  # of what the paper says: up to which beta, and how much of accuracy is little
MIDDLE = 0.1  # of them, which the others are compared with
NEAR = 0.05  # of accuracy, from the closed form


def run(options: Options, execute: Execute) -> None:
    """Every beta of GVPO and every KL coefficient of GRPO, on every seed."""
    cells = [
        options.cell(
            configs,
            {"task": task, "method": method, "beta": beta},
            METHODS[method] | {"model.beta": beta},
            seed,
            updates=UPDATES,
            learning_rate=None if options.configs else LEARNING_RATES[method],
        )
        for task, configs in options.tasks("sums").items()
        for method, betas in (("GVPO", BETAS), ("GRPO", KL_COEFFICIENTS))
        for beta in betas
        for seed in options.seeds or SEEDS
    ]
    execute(cells)


def table(rows: list[Row]) -> str:
    """Accuracy, the closed form's, and KL to the reference."""
    lines = []
    for (task, method, beta), found in group_by(rows, "task", "method", "beta").items():
        measured = [estimate([end(name)(row) for row in found]) for name in ("accuracy", "kl", "entropy")]
        predicted = show_predicted(found[0]) if method == "GVPO" else ""
        lines.append([task, method, beta, f"{measured[0]}{count_stopped(found)}", predicted, *measured[1:]])
    header = ["task", "method", "beta", "accuracy", "closed form", "KL to the reference, nats", "entropy, nats a token"]
    return markdown(header, lines)


def claims(rows: list[Row]) -> list[Claim]:
    """Little changes over beta; what does is what the optimum itself does; GVPO goes where its optimum is."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        of_beta = {
            beta: same for (method, beta), same in group_by(of_task, "method", "beta").items() if method == "GVPO"
        }
        predicted = {beta: same[0]["predicted"] for beta, same in of_beta.items() if same[0]["predicted"] is not None}
        robust = {beta: same for beta, same in of_beta.items() if beta <= LARGEST_ROBUST}
        if MIDDLE in robust and len(robust) > 1:
            found += robustness(task, robust, predicted)
        for beta, expected in predicted.items():
            gap = estimate([abs(end("accuracy")(row) - expected) for row in of_beta[beta]])
            says = f"At beta {beta} training ends within {NEAR} of the closed form's accuracy"
            found.append(Claim(says, f"{task}: {gap} from it", decide_below(gap, NEAR), "theory"))
    return found


def robustness(task: str, rows: dict[float, list[Row]], predicted: dict[float, float]) -> list[Claim]:
    """Each beta's accuracy minus the middle one's: as it is, and without what the optimum's own accuracy changes."""
    gaps = {beta: paired_difference(r, rows[MIDDLE], end("accuracy")) for beta, r in rows.items() if beta != MIDDLE}
    shown = ", ".join(f"{beta}: {gap}" for beta, gap in gaps.items())
    within = f"(each within {LITTLE} of beta {MIDDLE})"
    says = f"GVPO's accuracy changes little over beta from {min(rows)} to {max(rows)} {within}"
    measured = f"{task}: minus that of beta {MIDDLE}: {shown}"
    if not rows.keys() <= predicted.keys():
        return [Claim(says, measured, all_are_little(gaps.values()))]
    expected = {beta: predicted[beta] - predicted[MIDDLE] for beta in gaps}
    span = [predicted[beta] for beta in rows]
    measured += f"; the closed form's own accuracy goes from {max(span):.3f} to {min(span):.3f} over these betas"
    others = [replace(gap, mean=gap.mean - expected[beta]) for beta, gap in gaps.items()]
    rest = ", ".join(f"{beta}: {other}" for beta, other in zip(gaps, others, strict=True))
    theory = f"GVPO's accuracy changes with beta as the closed form's does {within}"
    return [
        Claim(says, measured, all_are_little(gaps.values())),
        Claim(theory, f"{task}: beyond the closed form's change {rest}", all_are_little(others), "theory"),
    ]


def all_are_little(gaps: Iterable[Estimate]) -> bool | None:
    """Whether changes of accuracy are little: all surely, or one surely not, each by its own interval."""
    return all_hold([decide_within(gap, LITTLE) for gap in gaps])


def accuracies(rows: list[Row], method: str, name: str) -> dict[float, Estimate]:
    """What was measured of a method, by beta."""
    groups = group_by(rows, "method", "beta").items()
    return {beta: estimate([end(name)(row) for row in same]) for (of, beta), same in groups if of == method}


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy and KL over beta, with the closed form's accuracy."""
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("accuracy", "kl"), ("accuracy", "KL to the reference, nats"), strict=True):
        for method, text in (("GVPO", "GVPO, beta"), ("GRPO", "GRPO, KL coefficient")):
            draw_line(axis, accuracies(rows, method, name), text)
        axis.set(xscale="log", xlabel="beta, or coefficient of the KL term", ylabel=label)
        axis.grid(alpha=0.3)
    predicted = {row["labels"]["beta"]: row["predicted"] for row in rows if row["labels"]["method"] == "GVPO"}
    if predicted and None not in predicted.values():
        axes[0].plot(list(predicted), list(predicted.values()), "k--", label="closed form of GVPO")
    axes[0].legend(fontsize=8)


ABOUT = f"""
The paper varies beta and finds little change between about {BETAS[0]} and {LARGEST_ROBUST}. Here GVPO with a frozen
reference is trained with {len(BETAS)} values, and GRPO with {len(KL_COEFFICIENTS)} coefficients of its KL term, for
{UPDATES} updates, at one learning rate each, linear to zero (GVPO {LEARNING_RATES["GVPO"]:g}, GRPO
{LEARNING_RATES["GRPO"]:g}: of the grid of Table 1's experiment; not tuned on these runs, nor for each beta). The
closed form is the exact accuracy of GVPO's one optimum, p e^(1/beta) / (p e^(1/beta) + 1 - p) averaged over the
held-out prompts; for GRPO none is given. It changes with beta by itself: where the base is not nearly always right, a
large beta must cost accuracy, however well it is trained. So what is said is how far accuracies are from that of beta
{MIDDLE}, and then how far beyond what the closed form changes; each interval counts by itself. KL is to the reference,
in nats a completion. GRPO's line is for comparison: its coefficient is another quantity than beta, and no claim is
made of it.
"""
EXPERIMENT = Experiment("beta", "Figure 2: how much depends on beta", ABOUT, run, table, claims, plot)
