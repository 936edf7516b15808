"""Who collapses where: learning rate and updates a rollout, for GVPO and what it is compared with."""

import math
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.divergence import RULE, divergence, largest_of
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import CONSTANT, METHODS, TASKS, Options
from benchmarks.paper.prepare import Configs, setting
from benchmarks.paper.tables import (
    LEVEL,
    Claim,
    all_hold,
    decide,
    end,
    estimate,
    fisher_p,
    group_by,
    markdown,
    paired_difference,
)
from gvpo_lightning.rollout.settings import RolloutSettings

COMPARED: dict[str, dict[str, Any]] = {
    "GVPO, frozen": METHODS["GVPO"] | {"model.reference": "frozen"},
    "GVPO, previous": METHODS["GVPO"] | {"model.reference": "previous"},
    "GRPO": METHODS["GRPO"] | {"model.reference": "frozen"},
    "PG + KL": METHODS["PG + KL"] | {"model.reference": "frozen"},
}
OURS, OTHERS = ("GVPO, frozen", "GVPO, previous"), ("GRPO", "PG + KL")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
UPDATES_PER_ROLLOUT = (1, 4, 16)
SEEDS = (0, 1)
UPDATES, EVALUATIONS = 64, 3
MARGIN = 0.02  # of accuracy: less is no loss
NOTHING = 1e-3  # nats, of a log-ratio


def run(options: Options, execute: Execute) -> None:
    """Every method at every learning rate and number of updates a rollout, on every seed."""
    cells = [
        options.cell(
            configs,
            {"task": task, "method": method, "updates_per_rollout": number, "learning_rate": rate},
            settings
            | {"model.rollout.prompts_per_rollout": number * prompts_per_update(configs)}
            | {"model.rollout.epochs_per_rollout": 1}
            | ({} if options.configs else CONSTANT),
            seed,
            updates=UPDATES,
            learning_rate=rate,
            meter={"completions": 4, "evaluations": EVALUATIONS},
        )
        for task, configs in options.tasks("sums").items()
        for rate in options.grid(LEARNING_RATES)
        for method, settings in COMPARED.items()
        for number in UPDATES_PER_ROLLOUT
        for seed in options.seeds or SEEDS
    ]
    execute(cells)


def prompts_per_update(configs: Configs) -> int:
    """What the configs say."""
    return int(setting(configs, "model.rollout.prompts_per_update", RolloutSettings().prompts_per_update))


def table(rows: list[Row]) -> str:
    """A line a method and number of updates a rollout: accuracy by learning rate, and the largest that happened."""
    rates = list(dict.fromkeys(row["labels"]["learning_rate"] for row in rows))
    lines = []
    for (task, method, number), found in group_by(rows, "task", "method", "updates_per_rollout").items():
        by_rate = group_by(found, "learning_rate")
        accuracies = [shown(by_rate.get((rate,), [])) for rate in rates]
        healthy = [row for row in found if divergence(row) is None]
        largest = [f"{max((largest_of(row, name) for row in healthy), default=0.0):.2g}" for name in LARGEST]
        collapsed = f"{len(found) - len(healthy)} of {len(found)}"
        skipped = sum(row["skipped_updates"] for row in found)
        lines.append([task, method, number, *accuracies, collapsed, skipped, *largest])
    header = ["task", "method", "updates a rollout", *(f"accuracy at {rate:g}" for rate in rates), "diverged"]
    header += [
        "updates skipped",
        "largest gradient norm",
        "largest log-ratio, nats (both of runs that did not diverge)",
    ]
    return markdown(header, lines)


LARGEST = ("gradient_norm", "log_ratio_max")


def shown(rows: list[Row]) -> str:
    """The mean accuracy, marked with how many runs diverged; nothing of no runs."""
    if not rows:
        return ""
    diverged = sum(divergence(row) is not None for row in rows)
    mark = f" (diverged: {diverged})" if diverged else ""
    value = mean_accuracy(rows)
    return f"{'n/a' if math.isnan(value) else f'{value:.3f}'}{mark}"


def mean_accuracy(rows: list[Row]) -> float:
    """At the end, of those that have been measured; NaN where none was."""
    return estimate([end("accuracy")(row) for row in rows]).mean


def claims(rows: list[Row]) -> list[Claim]:
    """Collapses, staleness, what `previous` is with one update a rollout, and where GVPO loses."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        methods = {method: same for (method,), same in group_by(of_task, "method").items()}
        both = [(ours, other) for ours in OURS for other in OTHERS if {ours, other} <= methods.keys()]
        found += [fewer_collapses(task, ours, other, methods) for ours, other in both]
        found += [claim for method in methods for claim in stale(task, method, methods[method])]
        if set(OURS) <= methods.keys():
            found += no_regulariser(task, methods["GVPO, previous"], methods["GVPO, frozen"])
        found += [best_against(task, ours, other, methods) for ours, other in both]
        found += [
            claim for ours, other in both if other == "GRPO" for claim in at_each_rate(task, ours, other, methods)
        ]
    return found


def source(other: str) -> str:
    """Whose a comparison with a method is."""
    return "paper" if other == "GRPO" else "ours"


def fewer_collapses(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """The paper's: GVPO trains stably. Decided by Fisher's exact test on the counts."""
    counts = [sum(divergence(row) is not None for row in methods[name]) for name in (ours, other)]
    totals = [len(methods[name]) for name in (ours, other)]
    p = fisher_p(*counts, *totals)
    measured = f"{task}: {counts[0]} of {totals[0]} and {counts[1]} of {totals[1]} runs, p = {p:.2g} (Fisher)"
    holds = None if p > 1 - LEVEL else counts[0] / totals[0] < counts[1] / totals[1]
    says = f"{ours} diverges less often than {other}, over all learning rates and rollouts"
    return Claim(says, measured, holds, source(other))


def best_rates(rows: list[Row]) -> dict[int, list[Row]]:
    """The runs at the learning rate with the highest mean accuracy, by updates a rollout."""
    best: dict[int, list[Row]] = {}
    for (number, _), same in group_by(rows, "updates_per_rollout", "learning_rate").items():
        mean = mean_accuracy(same)
        if number not in best or math.isnan(mean_accuracy(best[number])) or mean > mean_accuracy(best[number]):
            best[number] = same
    return best


def stale(task: str, method: str, rows: list[Row]) -> list[Claim]:
    """The theory's for GVPO: old completions need no importance weights."""
    best = best_rates(rows)
    fresh, old = min(best), max(best)
    if fresh == old:
        return []
    difference = paired_difference(best[old], best[fresh], end("accuracy"))
    measured = f"{task}: {difference} in accuracy, {CHOSEN}"
    says = f"{method}: {old} updates a rollout are as good as {fresh} (less than {MARGIN:g} worse)"
    return [Claim(says, measured, decide(difference, MARGIN), "theory" if method in OURS else "ours")]


def no_regulariser(task: str, rows: list[Row], frozen: list[Row]) -> list[Claim]:
    """Theory: the first update after a rollout is REINFORCE, and with one update a rollout there is no other."""
    by_number = group_by(rows, "updates_per_rollout")
    largest = {n: max(largest_of(row, "log_ratio_max") for row in same) for (n,), same in by_number.items()}
    if 1 not in largest:
        return []
    single = [group_by(of, "updates_per_rollout").get((1,), []) for of in (rows, frozen)]
    apart = [estimate([end("kl")(row) for row in same]) for same in single]
    texts = ", ".join(f"{value:.2g} with {number}" for number, value in largest.items())
    return [
        Claim(
            "With reference: previous and one update a rollout GVPO has no regulariser (all log-ratios are 0)",
            f"{task}: the largest log-ratio of all runs is, in nats, {texts} updates a rollout; with one, KL to the "
            f"start ends at {apart[0]}, and at {apart[1]} with the frozen reference (over all learning rates)",
            largest[1] < NOTHING,
            "theory",
        )
    ]


def best_against(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """The paper's: GVPO is the better method. At each number of updates a rollout, each at its best learning rate."""
    mine, theirs = best_rates(methods[ours]), best_rates(methods[other])
    differences = {
        number: paired_difference(mine[number], theirs[number], end("accuracy")) for number in mine if number in theirs
    }
    texts = ", ".join(f"{difference} with {number}" for number, difference in differences.items())
    return Claim(
        f"{ours} is nowhere more than {MARGIN:g} of accuracy worse than {other}",
        f"{task}: difference in accuracy {texts} updates a rollout, {CHOSEN}",
        all_hold([decide(difference, MARGIN) for difference in differences.values()]),
        source(other),
    )


def at_each_rate(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> list[Claim]:
    """Ours: where GVPO loses, if both must live with the same learning rate; over seeds and ages of rollouts."""
    mine, theirs = (group_by(methods[name], "learning_rate") for name in (ours, other))
    claims = []
    for (rate,) in mine.keys() & theirs.keys():
        pairs = [
            {(row["labels"]["updates_per_rollout"], row["seed"]): end("accuracy")(row) for row in of[(rate,)]}
            for of in (mine, theirs)
        ]
        difference = estimate([pairs[0][key] - pairs[1].get(key, math.nan) for key in pairs[0]])
        says = f"At learning rate {rate:g} {ours} is no more than {MARGIN:g} of accuracy worse than {other}"
        measured = f"{task}: difference {difference} over seeds and updates a rollout"
        claims.append(Claim(says, measured, decide(difference, MARGIN), "ours"))
    return sorted(claims, key=lambda claim: claim.says)


def plot(rows: list[Row], figure: Any) -> None:
    """A heat map a method: accuracy over learning rate and updates a rollout; x where a run diverged."""
    methods = group_by(rows, "method")
    all_axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for axis, ((method,), found) in zip(all_axes, methods.items(), strict=True):
        rates, numbers = (list(dict.fromkeys(row["labels"][name] for row in found)) for name in AXES)
        cells = group_by(found, *AXES)
        values = [[mean_accuracy(cells.get((x, y), [])) for x in rates] for y in numbers]
        image = axis.imshow(values, vmin=0.0, vmax=1.0, aspect="auto", origin="lower")
        for (rate, number), same in cells.items():
            row, column = numbers.index(number), rates.index(rate)
            value, diverged = values[row][column], any(divergence(r) is not None for r in same)
            text = ("n/a" if math.isnan(value) else f"{value:.2f}") + ("\nx" if diverged else "")
            color = "white" if value < 0.5 else "black"  # black on nothing, too
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set_yticks(range(len(numbers)), [str(number) for number in numbers])
        axis.set(title=method, xlabel="learning rate")
    figure.axes[0].set_ylabel("updates a rollout")
    figure.colorbar(image, ax=figure.axes, label="accuracy")


AXES = ("learning_rate", "updates_per_rollout")
CHOSEN = "each at its best learning rate, chosen on these runs"
PROMPTS = prompts_per_update(TASKS["sums"])
ROLLOUTS = ", ".join(str(number * PROMPTS) for number in UPDATES_PER_ROLLOUT)
STRENGTHS = {name: settings["model.beta"] for name, settings in COMPARED.items()}
ABOUT = f"""
The paper calls GVPO stable. Here learning rate (constant) and updates a rollout are varied: {UPDATES} updates of
{PROMPTS} prompts, from rollouts of {ROLLOUTS} prompts, so that the number of completions is the same and only their age
differs. GVPO (beta {STRENGTHS["GVPO, frozen"]:g}) with the frozen reference and with the previous policy, GRPO (KL
coefficient {STRENGTHS["GRPO"]:g}, clipped ratios) and the policy gradient with a KL penalty ({STRENGTHS["PG + KL"]:g},
clipped ratios); gradients are clipped to norm 1 for all. {RULE} Counts of diverged runs are compared by Fisher's exact
test over the whole grid, of {len(LEARNING_RATES)} learning rates, {len(UPDATES_PER_ROLLOUT)} ages and {len(SEEDS)}
seeds, which counts them as independent: they decide nothing unless they differ by much. Where a method is shown at its
best learning rate, the rate was chosen by the mean of the very runs that are compared, which flatters each of them.
Where GVPO can lose is a learning rate that is too large: its residual is not clipped, so that one completion with a
log-ratio of 20 nats (the table has the largest) moves everything, while clipping bounds what GRPO takes from one ratio.
That this is the cause is not isolated here. With long completions see the next section.
"""
EXPERIMENT = Experiment("stability", "Stability: who collapses where", ABOUT, run, table, claims, plot)
