"""Long completions: where the same beta is another strength, and what helps."""

from collections.abc import Callable
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.tables import (
    Claim,
    Estimate,
    decide,
    decide_below,
    estimate,
    group_by,
    markdown,
    paired_difference,
)

USUAL, BETA = "GVPO, beta 0.1", 0.1
SMALLER_BETAS = (0.03, 0.01)
EXPONENTS = (0.5, 1.0)
VARIANTS: dict[str, dict[str, Any]] = {
    USUAL: {"model.beta": BETA},
    **{f"GVPO, beta {beta:g}": {"model.beta": beta} for beta in SMALLER_BETAS},
    **{
        f"GVPO, beta 0.1, exponent {exponent:g}": {
            "model.beta": BETA,
            "model.objective": {"kind": "gvpo", "length_exponent": exponent},
        }
        for exponent in EXPONENTS
    },
    "GRPO": METHODS["GRPO"],
    "Dr.GRPO": METHODS["Dr.GRPO"],
}
PARTS = ("short", "middle", "long")
SEEDS = (0, 1, 2)
UPDATES, LEARNING_RATE = 48, 3e-4
NEAR = 0.2  # of 1/beta: as far may the separation be from it
MARGIN = 0.02  # of accuracy: less is no loss


def run(options: Options, execute: Execute) -> None:
    """Every variant on every seed."""
    cells = [
        options.cell(
            configs,
            {"task": task, "method": method},
            {"model.reference": "frozen"} | settings,
            seed,
            updates=UPDATES,
            learning_rate=None if options.configs else LEARNING_RATE,
            meter={"length_parts": len(PARTS), "completions": 8},
        )
        for task, configs in options.tasks("chains").items()
        for method, settings in VARIANTS.items()
        for seed in options.seeds or SEEDS
    ]
    execute(cells)


def of_part(part: int, name: str, when: str = "end") -> Callable[[Row], float]:
    """Reads what was measured of a third of the prompts; NaN where nothing was."""

    def read(row: Row) -> float:
        value = row[when]["by_length"][part][name]
        return float("nan") if value is None else float(value)

    return read


def measured(rows: list[Row], part: int, name: str, when: str = "end") -> Estimate:
    """Over seeds."""
    return estimate([of_part(part, name, when)(row) for row in rows])


def table(rows: list[Row]) -> str:
    """A line for each method and third of the prompts."""
    lines = []
    for (task, method), found in group_by(rows, "task", "method").items():
        for part, label in enumerate(PARTS):
            length = f"{label}, {measured(found, part, 'length', 'start').mean:.0f} tokens"
            started = f"{measured(found, part, 'accuracy', 'start').mean:.3f}"
            values = [measured(found, part, name) for name in ("accuracy", "separation", "noise")]
            residual = measured(found, part, "residual_rms") if method.startswith("GVPO") else ""
            lines.append([task, method, length, started, *values, residual])
    header = ["task", "method", "completions", "accuracy at the start", "accuracy", "right over wrong, nats"]
    return markdown([*header, "noise, nats", "residual, RMS"], lines)


def claims(rows: list[Row]) -> list[Claim]:
    """The theory's on separation and noise, and what helps long completions."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        methods = {method: same for (method,), same in group_by(of_task, "method").items()}
        usual, last = methods[USUAL], len(PARTS) - 1
        found.append(separated(task, usual))
        for name, what in (("noise", "noise of the log-ratio"), ("residual_rms", "residual")):
            ends = [measured(usual, part, name) for part in (0, last)]
            growth = estimate([of_part(last, name)(row) - of_part(0, name)(row) for row in usual])
            says = f"At one beta ({BETA:g}) the {what} is larger where completions are longer"
            found.append(Claim(says, f"{task}: {ends[0]} short, {ends[1]} long, by {growth}", decide(growth)))
        accuracy = of_part(last, "accuracy")
        for method, same in methods.items():
            difference = paired_difference(same, usual, accuracy)
            text = f"{task}: {measured(same, last, 'accuracy')}, {difference} more"
            if method in (USUAL, "GRPO", "Dr.GRPO"):
                continue
            says = f"{method} is better than beta {BETA:g} on the third with the longest completions"
            found.append(Claim(says, text, decide(difference)))
        best = max(methods, key=lambda name: name.startswith("GVPO") * measured(methods[name], last, "accuracy").mean)
        for ours in dict.fromkeys((USUAL, best)):
            for other in ("GRPO", "Dr.GRPO"):
                found.append(no_worse(task, ours, other, methods))
    return found


def separated(task: str, rows: list[Row]) -> Claim:
    """Whether right and wrong are as far apart as at the optimum, in every third."""
    values = [measured(rows, part, "separation") for part in range(len(PARTS))]
    off = [estimate([abs(of_part(p, "separation")(r) * BETA - 1) for r in rows]) for p in range(len(PARTS))]
    decisions = [decide_below(value, NEAR) for value in off]
    texts = ", ".join(f"{value} {label}" for value, label in zip(values, PARTS, strict=True))
    return Claim(
        f"At beta {BETA:g} right and wrong end 1/beta = {1 / BETA:g} nats apart at every length (within {NEAR:.0%})",
        f"{task}: {texts}",
        False if False in decisions else None if None in decisions else True,
    )


def no_worse(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """The paper's, on the third with the longest completions."""
    last = len(PARTS) - 1
    difference = paired_difference(methods[ours], methods[other], of_part(last, "accuracy"))
    values = [measured(methods[name], last, "accuracy") for name in (ours, other)]
    return Claim(
        f"{ours} is at most {MARGIN:g} of accuracy worse than {other} on the third with the longest completions",
        f"{task}: {values[0]} and {values[1]}, difference {difference}",
        decide(difference, MARGIN),
    )


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy gained, separation times beta, and noise, over length."""
    axes = figure.subplots(1, 3)
    for number, ((method,), found) in enumerate(group_by(rows, "method").items()):
        beta = found[0]["settings"]["model.beta"]
        lengths = [measured(found, part, "length", "start").mean for part in range(len(PARTS))]
        gains = [
            measured(found, part, "accuracy").mean - measured(found, part, "accuracy", "start").mean
            for part in range(len(PARTS))
        ]
        separations = [measured(found, part, "separation").mean for part in range(len(PARTS))]
        noises = [measured(found, part, "noise").mean for part in range(len(PARTS))]
        style = {"marker": "o", "color": f"C{number}", "label": method}
        axes[0].plot(lengths, gains, **style)
        axes[1].plot(lengths, noises, **style)
        if method.startswith("GVPO"):
            axes[2].plot(lengths, [beta * value for value in separations], **style)
    axes[2].axhline(1.0, color="k", linestyle="--")
    labels = ("accuracy gained", "noise of the log-ratio, nats", "beta x (right over wrong); 1 at the optimum")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel="tokens of a completion", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)


ABOUT = f"""
GVPO compares beta times a sum of token log-ratios with a reward that does not grow with length. At its optimum right
and wrong are 1/beta nats apart at any length, but what the log-ratio has of noise (that among equally right
completions of a prompt, 0 at the optimum) is a sum over tokens: the longer they are, the more of the same residual is
regularisation, and the less of it is reward. Measured on thirds of the held-out prompts by the length of the starting
policy's completions: log-ratios are of those completions, so that right and wrong ones are there whatever was learned.
What may help: a smaller beta, or dividing log-ratios by |y|^exponent (`objective.length_exponent`); beside them GRPO
(KL coefficient 0.04) and Dr.GRPO (none). Frozen reference, {UPDATES} updates, learning rate {LEARNING_RATE:g}, linear
to zero: training ends before the optimum, so that the separation shows how far it has come.
"""
EXPERIMENT = Experiment("lengths", "Long completions", ABOUT, run, table, claims, plot)
