"""Who collapses where: learning rate and updates a rollout, for GVPO and what it is compared with."""

from collections.abc import Sequence
from typing import Any

from benchmarks.paper.cells import Execute, Row, config_texts
from benchmarks.paper.divergence import RULE, divergence
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import CONSTANT, METHODS, Options
from benchmarks.paper.tables import Claim, decide, end, estimate, group_by, markdown, paired_difference
from gvpo_lightning.rollout.sampling import RolloutSettings

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


def prompts_per_update(configs: Sequence[str]) -> int:
    """What the last of the configs says that says it."""
    found = [config.get("model", {}).get("rollout", {}) for config in config_texts(configs).values()]
    told = [rollout["prompts_per_update"] for rollout in found if "prompts_per_update" in rollout]
    return int(told[-1]) if told else RolloutSettings().prompts_per_update


def table(rows: list[Row]) -> str:
    """A line a method and number of updates a rollout: accuracy by learning rate, and the largest that happened."""
    rates = list(dict.fromkeys(row["labels"]["learning_rate"] for row in rows))
    lines = []
    for (task, method, number), found in group_by(rows, "task", "method", "updates_per_rollout").items():
        by_rate = group_by(found, "learning_rate")
        accuracies = [shown(by_rate[(rate,)]) for rate in rates]
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
    """The mean accuracy, marked with how many runs diverged."""
    diverged = sum(divergence(row) is not None for row in rows)
    mark = f" (diverged: {diverged})" if diverged else ""
    return f"{estimate([end('accuracy')(row) for row in rows]).mean:.3f}{mark}"


def largest_of(row: Row, name: str) -> float:
    """Of the whole run."""
    return max((float(point[name]) for point in row["trace"]), default=0.0)


def claims(rows: list[Row]) -> list[Claim]:
    """Collapses, staleness, what `previous` is with one update a rollout, and where GVPO loses."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        methods = {method: same for (method,), same in group_by(of_task, "method").items()}
        found += [fewer_collapses(task, ours, other, methods) for ours in OURS for other in OTHERS]
        found += [stale(task, method, methods[method]) for method in methods]
        found.append(no_regulariser(task, methods["GVPO, previous"], methods["GVPO, frozen"]))
        found += [best_against(task, ours, other, methods) for ours in OURS for other in OTHERS]
    return found


def fewer_collapses(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """The paper's: GVPO trains stably. Undecided where as many diverge."""
    counts = [sum(divergence(row) is not None for row in methods[name]) for name in (ours, other)]
    measured = f"{task}: {counts[0]} and {counts[1]} of {len(methods[ours])} runs"
    holds = None if counts[0] == counts[1] else counts[0] < counts[1]
    return Claim(f"{ours} diverges less often than {other}, over all learning rates and rollouts", measured, holds)


def best_rates(rows: list[Row]) -> dict[int, list[Row]]:
    """The runs at the learning rate with the highest mean accuracy, by updates a rollout."""
    best: dict[int, list[Row]] = {}
    for (number, _), same in group_by(rows, "updates_per_rollout", "learning_rate").items():
        mean = estimate([end("accuracy")(row) for row in same]).mean
        if number not in best or mean > estimate([end("accuracy")(row) for row in best[number]]).mean:
            best[number] = same
    return best


def stale(task: str, method: str, rows: list[Row]) -> Claim:
    """The theory's for GVPO: old completions need no importance weights."""
    best = best_rates(rows)
    fresh, old = min(best), max(best)
    difference = paired_difference(best[old], best[fresh], end("accuracy"))
    measured = f"{task}: {difference} in accuracy, each at its best learning rate"
    says = f"{method}: {old} updates a rollout are as good as {fresh} (less than {MARGIN:g} worse)"
    return Claim(says, measured, decide(difference, MARGIN))


def no_regulariser(task: str, rows: list[Row], frozen: list[Row]) -> Claim:
    """Theory: the first update after a rollout is REINFORCE, and with one update a rollout there is no other."""
    by_number = group_by(rows, "updates_per_rollout")
    largest = {n: max(largest_of(row, "log_ratio_max") for row in same) for (n,), same in by_number.items()}
    apart = [estimate([end("kl")(row) for row in group_by(of, "updates_per_rollout")[(1,)]]) for of in (rows, frozen)]
    texts = ", ".join(f"{value:.2g} with {number}" for number, value in largest.items())
    return Claim(
        "With reference: previous and one update a rollout GVPO has no regulariser (all log-ratios are 0)",
        f"{task}: the largest log-ratio of all runs is, in nats, {texts} updates a rollout; with one, KL to the "
        f"start ends at {apart[0]}, and at {apart[1]} with the frozen reference (over all learning rates)",
        largest[1] < NOTHING,
    )


def best_against(task: str, ours: str, other: str, methods: dict[str, list[Row]]) -> Claim:
    """The paper's: GVPO is the better method. At each number of updates a rollout, each at its best learning rate."""
    mine, theirs = best_rates(methods[ours]), best_rates(methods[other])
    differences = {number: paired_difference(mine[number], theirs[number], end("accuracy")) for number in mine}
    decisions = [decide(difference, MARGIN) for difference in differences.values()]
    texts = ", ".join(f"{difference} with {number}" for number, difference in differences.items())
    return Claim(
        f"{ours} is nowhere more than {MARGIN:g} of accuracy worse than {other}, each at its best learning rate",
        f"{task}: difference in accuracy {texts} updates a rollout",
        False if False in decisions else None if None in decisions else True,
    )


def plot(rows: list[Row], figure: Any) -> None:
    """A heat map a method: accuracy over learning rate and updates a rollout; x where a run diverged."""
    methods = group_by(rows, "method")
    for axis, ((method,), found) in zip(figure.subplots(1, len(methods), sharey=True), methods.items(), strict=True):
        rates, numbers = (list(dict.fromkeys(row["labels"][name] for row in found)) for name in AXES)
        cells = group_by(found, *AXES)
        values = [[estimate([end("accuracy")(r) for r in cells[x, y]]).mean for x in rates] for y in numbers]
        image = axis.imshow(values, vmin=0.0, vmax=1.0, aspect="auto", origin="lower")
        for (rate, number), same in cells.items():
            row, column = numbers.index(number), rates.index(rate)
            diverged = any(divergence(r) is not None for r in same)
            color = "white" if values[row][column] < 0.5 else "black"
            text = f"{values[row][column]:.2f}" + ("\nx" if diverged else "")
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set_yticks(range(len(numbers)), [str(number) for number in numbers])
        axis.set(title=method, xlabel="learning rate")
    figure.axes[0].set_ylabel("updates a rollout")
    figure.colorbar(image, ax=figure.axes, label="accuracy")


AXES = ("learning_rate", "updates_per_rollout")
ABOUT = f"""
The paper calls GVPO stable. Here learning rate (constant) and updates a rollout are varied: {UPDATES} updates of 8
prompts, from rollouts of 8, 32 and 128 prompts, so that the number of completions is the same and only their age
differs. GVPO (beta 0.1) with the frozen reference and with the previous policy, GRPO (KL coefficient 0.04, clipped
ratios) and the policy gradient with a KL penalty (0.1, clipped ratios); gradients are clipped to norm 1 for all. {RULE}
"""
EXPERIMENT = Experiment("stability", "Stability: who collapses where", ABOUT, run, table, claims, plot)
