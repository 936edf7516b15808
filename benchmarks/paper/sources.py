"""Figure 4 of the paper: completions of earlier policies, and of others, among the fresh ones."""

from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import ANSWERS, METHODS, Options
from benchmarks.paper.prepare import record
from benchmarks.paper.tables import (
    COUNTDOWN,
    Claim,
    Estimate,
    count_stopped,
    curve,
    decide,
    end,
    estimate,
    group_by,
    markdown,
    paired_difference,
    show_predicted,
)

FRESH, RECORDED, SHOWN = "0:8", "8:0", "1 shown"
REPLAYED = {"2:6": 0.25, "4:4": 0.5, "6:2": 0.75}  # of a group, from the run's own earlier rollouts
MIXTURES = (FRESH, *REPLAYED, RECORDED, SHOWN)
SEEDS = (0, 1, 2)
BETA = METHODS["GVPO"]["model.beta"]
UPDATES = 120  # three passes over 320 prompts: in the first there is nothing to replay
LEARNING_RATES = {"sums": 1e-3, "countdown": 3e-4}  # the best of fresh completions in table1
IN_FILE = 32  # completions of each prompt, of which a group gets 8, others in every rollout
MARGIN = 0.03  # of accuracy, by which a mixture may be below fresh completions and still be as good


def run(options: Options, execute: Execute) -> None:
    """Every mixture on every seed, and the file that the recorded ones come from."""
    cells = []
    for task, configs in options.tasks("sums", "countdown").items():
        large = {} if options.configs else {"model.rollout.group_size": IN_FILE}
        file = record(configs, options.folder / f"recorded_{task}", large)
        for mixture in MIXTURES:
            sources = mixture_settings(mixture, file, ANSWERS.get(task))
            if sources is None:
                continue
            cells += [
                options.cell(
                    configs,
                    {"task": task, "method": "GVPO", "historical:fresh": mixture},
                    METHODS["GVPO"] | sources,
                    seed,
                    updates=UPDATES,
                    learning_rate=LEARNING_RATES.get(task),  # None of a config's own task: its own
                    meter={"evaluations": 2},
                )
                for seed in options.seeds or SEEDS
            ]
    execute(cells)


def mixture_settings(mixture: str, file: Path, answers: str | None) -> dict[str, Any] | None:
    """The run's settings for a mixture; None where it needs a column with right answers, and there is none."""
    if mixture == FRESH:
        return {}
    if mixture in REPLAYED:
        return {"model.sources": {"replay": {"count": REPLAYED[mixture]}}}
    if mixture == RECORDED:
        return {"model.sources": {"policy": 0, "file": {"path": str(file), "count": 1.0}}}
    return {"model.sources": {"demonstrations": {"column": answers, "count": 1}}} if answers else None


def by_mixture(rows: list[Row], name: str) -> dict[str, Estimate]:
    """What was measured at the end, of one task."""
    return {
        mixture: estimate([end(name)(row) for row in same])
        for (mixture,), same in group_by(rows, "historical:fresh").items()
    }


def replayed_share(row: Row) -> float:
    """The share of replayed completions, over the run."""
    return float(sum(point.get("replayed") or 0.0 for point in row["trace"]) / max(len(row["trace"]), 1))


def table(rows: list[Row]) -> str:
    """Accuracy beside the closed form's, what was replayed, and how long sampling took."""
    lines = []
    for (task, mixture), found in group_by(rows, "task", "historical:fresh").items():
        measured = [estimate([end(name)(row) for row in found]) for name in ("accuracy", "kl")]
        replayed = estimate([replayed_share(row) for row in found]).mean
        sampling = estimate([float(row["seconds"]["rollout"]) for row in found]).mean
        accuracy = f"{measured[0]}{count_stopped(found)}"
        shown = [accuracy, show_predicted(found[0]), measured[1], f"{replayed:.2f}", f"{sampling:.1f}"]
        lines.append([task, mixture, *shown])
    header = ["task", "historical:fresh", "accuracy", "closed form", "KL to the reference, nats"]
    return markdown([*header, "replayed, share of the run", "seconds sampling"], lines)


def claims(rows: list[Row]) -> list[Claim]:
    """Each mixture beside fresh completions alone."""
    found = []
    for (task,), of_task in group_by(rows, "task").items():
        groups = group_by(of_task, "historical:fresh")
        fresh = groups.get((FRESH,))
        accuracies = by_mixture(of_task, "accuracy")
        for mixture in MIXTURES:
            if fresh is None or mixture == FRESH or (mixture,) not in groups:
                continue
            gap = paired_difference(groups[(mixture,)], fresh, end("accuracy"))
            shown = f"{task}: {accuracies[mixture]}, fresh {accuracies[FRESH]}; difference {gap}"
            found.append(Claim(SAYS[mixture], shown, decide(gap, MARGIN), SOURCES.get(mixture, "ours")))
    return found


SAYS = {
    mixture: f"With historical : fresh {mixture} GVPO is as good as with fresh completions (within {MARGIN})"
    for mixture in ("2:6", "4:4")
}
SAYS["6:2"] = f"Beyond the paper's figure, 6:2: as good as fresh completions (within {MARGIN})"
# theory promises the same optimum from any sampler with full support, and says nothing of how soon
SAYS[RECORDED] = f"After {UPDATES} updates 8:0, nothing sampled, is as good as fresh completions (within {MARGIN})"
SAYS[SHOWN] = f"After {UPDATES} updates one demonstration in 8 has done no harm (within {MARGIN})"


SOURCES = {"2:6": "paper", "4:4": "paper", "6:2": "ours"}


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy while training, the mean over seeds, a panel for each task."""
    panels = group_by(rows, "task")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, ((task,), found) in zip(axes, panels.items(), strict=True):
        for (mixture,), same in group_by(found, "historical:fresh").items():
            points = curve(same, "accuracy")
            axis.plot(list(points), list(points.values()), marker=".", label=mixture)
        if found[0]["predicted"] is not None:
            axis.axhline(found[0]["predicted"], color="black", linestyle="--", label="closed form")
        axis.set(title=task, xlabel="optimizer updates")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out prompts")
    axes[0].legend(fontsize=8, title="historical:fresh")


RATES = ", ".join(f"{rate:g} ({task})" for task, rate in LEARNING_RATES.items())
ABOUT = f"""
Figure 4 of the paper: groups of 8 with historical and fresh completions as 0:8 to 4:4; GVPO is robust. Here also 6:2
and 8:0, {UPDATES} updates each, beta {BETA}, learning rates {RATES}, linear to zero: what Table 1 found best for GVPO
on fresh completions, for all mixtures. What is historical: of *2:6, 4:4, 6:2* completions that this run has sampled for
the same prompt in earlier rollouts, drawn uniformly (`sources.replay`); as long as a prompt has none, in the first of
the three passes over the sums, its whole group is fresh, so that the share over the run is smaller (in the table). Of
*8:0* what the policy said before training, when it was the reference: {IN_FILE} completions of each prompt, 8 of them
drawn for each group (`gvpo predict`, `sources.file`); nothing is sampled. *1 shown* is 7 fresh ones and one right
answer from the dataset (`sources.demonstrations`), and is left out with `--config`. Theory promises the same optimum
from any sampler with full support, not that it is reached as soon. The closed form is the optimum's
exact accuracy on the held-out prompts. GRPO can't take such groups: its ratios need the sampler's log-probs of every
token, which people don't have and most files neither, and `model.objective: grpo` refuses them; `benchmarks.sampling`
has it beside GVPO on files that bring them along, at beta = 1. {COUNTDOWN}
"""
EXPERIMENT = Experiment("sources", "Figure 4: historical and other completions", ABOUT, run, table, claims, plot)
