"""Long completions: where the same beta is another strength, and what helps."""

import math
from collections.abc import Callable
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.tables import (
    Claim,
    Estimate,
    as_number,
    count_stopped,
    decide,
    decide_all,
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
OTHERS = ("GRPO", "Dr.GRPO")
OURS = tuple(name for name in VARIANTS if name not in OTHERS)
WITH_EXPONENT = tuple(name for name in OURS if "exponent" in name)
PARTS = ("short", "middle", "long")
LAST = len(PARTS) - 1
SEEDS = (0, 1, 2)
UPDATES, LEARNING_RATE = 48, 3e-4
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
        return as_number(row[when] and row[when]["by_length"][part][name])

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
            residual = measured(found, part, "residual_rms") if method in OURS else ""
            shown = [f"{values[0]}{count_stopped(found)}", values[1], optimum(found, part), values[2], residual]
            lines.append([task, method, length, started, *shown])
    header = ["task", "method", "completions", "accuracy at the start", "accuracy", "right over wrong, nats"]
    return markdown([*header, "at GVPO's optimum", "noise, nats", "residual, RMS"], lines)


def exponent_of(row: Row) -> float:
    """By which power of their length a run divides log-ratios."""
    objective = row["settings"].get("model.objective")
    return float(objective.get("length_exponent", 0.0)) if isinstance(objective, dict) else 0.0


def optimum(rows: list[Row], part: int) -> str:
    """How far right and wrong are apart at GVPO's optimum: |y|^exponent / beta, at the part's mean length."""
    if rows[0]["labels"]["method"] not in OURS:
        return ""
    length = measured(rows, part, "length", "start").mean
    return f"{length ** exponent_of(rows[0]) / rows[0]['settings']['model.beta']:.0f}"


def claims(rows: list[Row]) -> list[Claim]:
    """The theory's on noise, and what helps long completions."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        methods = {method: same for (method,), same in group_by(of_task, "method").items()}
        if USUAL not in methods:
            continue
        usual = methods[USUAL]
        for name, what in (("noise", "noise of the log-ratio"), ("residual_rms", "residual")):
            ends = [measured(usual, part, name) for part in (0, LAST)]
            growth = estimate([of_part(LAST, name)(row) - of_part(0, name)(row) for row in usual])
            says = f"At one beta ({BETA:g}) the {what} is larger where completions are longer"
            found.append(Claim(says, f"{task}: {ends[0]} short, {ends[1]} long, by {growth}", decide(growth), "theory"))
        found += [helps(task, name, methods) for name in OURS if name in methods and name != USUAL]
        found += [against_betas(task, name, methods) for name in WITH_EXPONENT if name in methods]
        best = max((name for name in OURS if name in methods), key=lambda name: rank(methods[name]))
        for ours in dict.fromkeys((USUAL, best)):
            found += [no_worse(task, ours, other, methods) for other in OTHERS if other in methods]
    return found


def rank(rows: list[Row]) -> float:
    """Mean accuracy on the longest third; below all others where there is none."""
    mean = measured(rows, LAST, "accuracy").mean
    return -math.inf if math.isnan(mean) else mean


def helps(task: str, method: str, methods: dict[str, list[Row]]) -> Claim:
    """Whether a smaller beta or an exponent is better than the usual setting, on the longest third."""
    difference = paired_difference(methods[method], methods[USUAL], of_part(LAST, "accuracy"))
    says = f"{method} is better than beta {BETA:g} on the third with the longest completions"
    text = f"{task}: {measured(methods[method], LAST, 'accuracy')}, {difference} more"
    if method in WITH_EXPONENT:
        rows = methods[method]
        like = BETA / measured(rows, LAST, "length", "start").mean ** exponent_of(rows[0])
        text += f"; at this length as small a pull as beta {like:.2g} without an exponent"
    return Claim(says, text, decide(difference), "ours")


def against_betas(task: str, method: str, methods: dict[str, list[Row]]) -> Claim:
    """Whether an exponent does what a smaller beta does not."""
    names = [f"GVPO, beta {beta:g}" for beta in SMALLER_BETAS]
    gaps = {
        name: paired_difference(methods[method], methods[name], of_part(LAST, "accuracy"))
        for name in names
        if name in methods
    }
    says = f"{method} is better than each smaller beta on the third with the longest completions"
    shown = ", ".join(f"{gap} more than {name}" for name, gap in gaps.items())
    return Claim(says, f"{task}: {shown}", decide_all(list(gaps.values()), decide), "ours")


def no_worse(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """Against another method, on the third with the longest completions."""
    difference = paired_difference(methods[ours], methods[other], of_part(LAST, "accuracy"))
    values = [measured(methods[name], LAST, "accuracy") for name in (ours, other)]
    chosen = "" if ours == USUAL else f" (the best of GVPO's {len(OURS)} settings, chosen on these runs)"
    return Claim(
        f"{ours}{chosen} is at most {MARGIN:g} of accuracy worse than {other} on the third with the longest "
        "completions",
        f"{task}: {values[0]} and {values[1]}, difference {difference}",
        decide(difference, MARGIN),
        "ours",
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
        if method in OURS and method not in WITH_EXPONENT:  # with one, the optimum is elsewhere at each length
            axes[2].plot(lengths, [beta * value for value in separations], **style)
    axes[2].axhline(1.0, color="k", linestyle="--")
    axes[2].set_title("without exponents")
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
(KL coefficient {METHODS["GRPO"]["model.beta"]:g}) and Dr.GRPO ({METHODS["Dr.GRPO"]["model.beta"]:g}). Frozen
reference, {UPDATES} updates, learning rate {LEARNING_RATE:g}, linear to zero: training ends before the optimum, so that
the separation, beside its value at the optimum, shows how far it has come, and no claim is made of it.

With an exponent the optimum is another one: right and wrong are |y|^exponent/beta nats apart, and since beta is not
rescaled here, the pull to the reference is weaker at every length, as with beta/|y|^exponent. An exponent that does
better than beta {BETA:g} may do so for its smaller pull alone; so it is compared with the smaller betas too
({", ".join(f"{beta:g}" for beta in SMALLER_BETAS)}). Where the best of GVPO's {len(OURS)} settings is compared
with other methods, it was chosen on the same runs, in its favour; the usual
setting, compared beside it, was not. All claims
on accuracy here are questions of this page.
"""
EXPERIMENT = Experiment("lengths", "Long completions", ABOUT, run, table, claims, plot)
