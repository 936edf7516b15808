"""Figure 2 of the paper: how much depends on beta."""

from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.tables import Claim, Estimate, decide_below, end, estimate, group_by, markdown

BETAS = (0.01, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0)
KL_COEFFICIENTS = (0.01, 0.04, 0.1, 0.3, 1.0)
SEEDS = (0, 1, 2)
UPDATES = 120
LEARNING_RATES = {"GVPO": 1e-3, "GRPO": 1e-3}
LARGEST_ROBUST, LITTLE = 0.5, 0.05  # of what the paper says: up to which beta, and how much of accuracy is little
NEAR = 0.05  # of accuracy, from the closed form
SMALLEST = 0.003  # where 0 is drawn on a logarithmic axis


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
        predicted = "" if found[0]["predicted"] is None else f"{found[0]['predicted']:.3f}"
        measured = [estimate([end(name)(row) for row in found]) for name in ("accuracy", "kl", "entropy")]
        lines.append([task, method, beta, measured[0], predicted, *measured[1:]])
    header = ["task", "method", "beta", "accuracy", "closed form", "KL to the reference, nats", "entropy, nats a token"]
    return markdown(header, lines)


def claims(rows: list[Row]) -> list[Claim]:
    """Little changes over beta; GVPO goes where its optimum is; GRPO's coefficient matters more."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        ours = accuracies(of_task, "GVPO", "accuracy")
        small = {beta: value for beta, value in ours.items() if beta <= LARGEST_ROBUST}
        spread = max(v.mean for v in small.values()) - min(v.mean for v in small.values())
        shown = ", ".join(f"{beta}: {value}" for beta, value in small.items())
        says = f"GVPO's accuracy changes little over beta from 0.01 to 0.5 (less than {LITTLE} here)"
        found.append(Claim(says, f"{task}: by {spread:.3f} ({shown})", spread < LITTLE))
        gaps = {
            beta: estimate([abs(end("accuracy")(row) - row["predicted"]) for row in same])
            for (method, beta), same in group_by(of_task, "method", "beta").items()
            if method == "GVPO" and same[0]["predicted"] is not None
        }
        for beta, gap in gaps.items():
            says = f"At beta {beta} training ends within {NEAR} of the closed form's accuracy"
            found.append(Claim(says, f"{task}: {gap} from it", decide_below(gap, NEAR)))
    return found


def accuracies(rows: list[Row], method: str, name: str) -> dict[float, Estimate]:
    """What was measured of a method, by beta."""
    groups = group_by(rows, "method", "beta").items()
    return {beta: estimate([end(name)(row) for row in same]) for (of, beta), same in groups if of == method}


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy and KL over beta, with the closed form's accuracy."""
    axes = figure.subplots(1, 2)
    for axis, name, label in zip(axes, ("accuracy", "kl"), ("accuracy", "KL to the reference, nats"), strict=True):
        for method, text in (("GVPO", "GVPO, beta"), ("GRPO", "GRPO, KL coefficient (0 at the left edge)")):
            points = {max(beta, SMALLEST): value for beta, value in accuracies(rows, method, name).items()}
            means, halves = [v.mean for v in points.values()], [v.half or 0.0 for v in points.values()]
            axis.errorbar(list(points), means, halves, marker="o", capsize=3, label=text)
        axis.set(xscale="log", xlabel="beta, or coefficient of the KL term", ylabel=label)
        axis.grid(alpha=0.3)
    predicted = {row["labels"]["beta"]: row["predicted"] for row in rows if row["labels"]["method"] == "GVPO"}
    if None not in predicted.values():
        axes[0].plot(list(predicted), list(predicted.values()), "k--", label="closed form")
    axes[0].legend(fontsize=8)


ABOUT = f"""
The paper varies beta and finds little change between about 0.01 and 0.5. Here GVPO with a frozen reference is trained
with {len(BETAS)} values, and GRPO with {len(KL_COEFFICIENTS)} coefficients of its KL term, at one learning rate each
(GVPO {LEARNING_RATES["GVPO"]:g}, GRPO {LEARNING_RATES["GRPO"]:g}, linear to zero), {UPDATES} updates. The closed form
is the exact accuracy of the one optimum, p e^(1/beta) / (p e^(1/beta) + 1 - p) averaged over the held-out prompts; KL
is to the reference, in nats a completion.
"""
EXPERIMENT = Experiment("beta", "Figure 2: how much depends on beta", ABOUT, run, table, claims, plot)
