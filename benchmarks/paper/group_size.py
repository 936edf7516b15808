"""Figure 3 of the paper: how much the number of completions of a prompt brings."""

import itertools
import math
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.prepare import Configs, setting
from benchmarks.paper.tables import Claim, Estimate, decide, end, estimate, group_by, markdown, paired_difference

GROUP_SIZES = (2, 4, 8, 16, 64)
COMPARED = ("GVPO", "GRPO")
SEEDS = (0, 1, 2)
UPDATES = 40
LEARNING_RATES = {"GVPO": 1e-3, "GRPO": 1e-3}
PROMPTS = 4  # of an update, where all group sizes have as many
SAMPLES = 128  # completions of an update, where all group sizes have as many
UPDATES_A_ROLLOUT = 4
PROMPTS_HELD, SAMPLES_HELD = "equal prompts", "equal samples"
# the large policy alone where samples are equal: the question of sizes is put at equal prompts
DESIGNS = {"sums": (PROMPTS_HELD, SAMPLES_HELD), "sums_small": (PROMPTS_HELD,), "config": (PROMPTS_HELD, SAMPLES_HELD)}


def run(options: Options, execute: Execute) -> None:
    """Every group size of both methods, in both designs, on every seed."""
    cells = [
        options.cell(
            configs,
            {"task": task, "design": design, "method": method, "group_size": size},
            METHODS[method] | rollout_settings(options.configs, design, size),
            seed,
            updates=UPDATES,
            learning_rate=None if options.configs else LEARNING_RATES[method],
        )
        for task, configs in options.tasks("sums", "sums_small").items()
        for design in DESIGNS[task]
        for method in COMPARED
        for size in GROUP_SIZES
        for seed in options.seeds or SEEDS
    ]
    execute(cells)


def rollout_settings(configs: Configs | None, design: str, group_size: int) -> dict[str, Any]:
    """Prompts of an update and a rollout for a group size; of a config its own prompts, or completions, are held."""
    prompts, samples, updates, accumulate = PROMPTS, SAMPLES, UPDATES_A_ROLLOUT, 1
    if configs:
        prompts = setting(configs, "model.rollout.prompts_per_update", 8)
        samples = prompts * setting(configs, "model.rollout.group_size", 8)
        updates = math.ceil(setting(configs, "model.rollout.prompts_per_rollout", 32) / prompts)
        accumulate = setting(configs, "trainer.accumulate_grad_batches", 1)
    if design == SAMPLES_HELD:
        prompts = max(1, samples // group_size)
    found = {
        "model.rollout.group_size": group_size,
        "model.rollout.prompts_per_update": prompts,
        "model.rollout.prompts_per_rollout": prompts * updates,
    }
    if configs:  # micro-batches stay as large as they are
        found["trainer.accumulate_grad_batches"] = max(1, math.ceil(accumulate * prompts * group_size / samples))
    return found


def table(rows: list[Row]) -> str:
    """Accuracy by group size, a line for each task, design and method."""
    lines = []
    for (task, design), found in group_by(rows, "task", "design").items():
        for method, sizes in accuracies(found).items():
            lines.append([task, design, method, *(sizes.get(size, "") for size in GROUP_SIZES)])
    header = ["task", "held", "method", *(f"k = {size}" for size in GROUP_SIZES)]
    return markdown(header, lines)


def accuracies(rows: list[Row]) -> dict[str, dict[int, Estimate]]:
    """By method and group size, of one task and design."""
    found: dict[str, dict[int, Estimate]] = {}
    for (method, size), same in group_by(rows, "method", "group_size").items():
        found.setdefault(method, {})[size] = estimate([end("accuracy")(row) for row in same])
    return found


def claims(rows: list[Row]) -> list[Claim]:
    """GVPO above GRPO at every group size, rising; a small policy with large groups beside a large one."""
    found = []
    for (task, design), same in group_by(rows, "task", "design").items():
        found += [above(same, f"{task}, {design}"), rising(same, f"{task}, {design}")]
    small = [row for row in rows if row["labels"]["task"] == "sums_small"]
    large = [row for row in rows if row["labels"]["task"] == "sums" and row["labels"]["design"] == PROMPTS_HELD]
    return [*found, *reaches(small, large)] if small and large else found


def above(rows: list[Row], where: str) -> Claim:
    """GVPO - GRPO at each group size; holds where no interval reaches below 0, fails where one lies below."""
    groups = group_by(rows, "method", "group_size")
    gaps = {
        size: paired_difference(of_gvpo, groups[("GRPO", size)], end("accuracy"))
        for (method, size), of_gvpo in groups.items()
        if method == "GVPO" and ("GRPO", size) in groups
    }
    verdicts = [decide(gap) for gap in gaps.values()]
    shown = ", ".join(f"k = {size}: {gap}" for size, gap in gaps.items())
    holds = False if False in verdicts else None if None in verdicts else True
    return Claim("GVPO is above GRPO at every group size", f"{where}: GVPO - GRPO is {shown}", holds)


def rising(rows: list[Row], where: str) -> Claim:
    """GVPO's accuracy from each group size to the next; fails where one of the steps surely leads down."""
    groups = group_by([row for row in rows if row["labels"]["method"] == "GVPO"], "group_size")
    sizes = sorted(groups)
    steps = [
        paired_difference(groups[after], groups[before], end("accuracy")) for before, after in itertools.pairwise(sizes)
    ]
    verdicts = [decide(step) for step in steps]
    shown = ", ".join(f"{size[0]}: {estimate([end('accuracy')(r) for r in groups[size]])}" for size in sizes)
    holds = False if False in verdicts else None if None in verdicts else True
    return Claim("GVPO's accuracy rises with every doubling of the group size", f"{where}: {shown}", holds)


def reaches(small: list[Row], large: list[Row]) -> list[Claim]:
    """The small policy's best group size against the large policy's smallest, at equal prompts."""
    of_small, of_large = accuracies(small).get("GVPO", {}), accuracies(large).get("GVPO", {})
    if not of_small or not of_large:
        return []
    most, least = max(of_small), min(of_large)
    gap = paired_difference(
        [row for row in small if row["labels"]["method"] == "GVPO" and row["labels"]["group_size"] == most],
        [row for row in large if row["labels"]["method"] == "GVPO" and row["labels"]["group_size"] == least],
        end("accuracy"),
    )
    starts = [estimate([float(row["start"]["accuracy"]) for row in rows]).mean for rows in (small, large)]
    says = "A small policy with large groups reaches a large one with small groups"
    measured = (
        f"k = {most} of the small policy: {of_small[most]} (from {starts[0]:.3f}); "
        f"k = {least} of the large one: {of_large[least]} (from {starts[1]:.3f})"
    )
    return [Claim(says, measured, decide(gap))]


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy over group sizes, a panel for each task and design."""
    panels = group_by(rows, "task", "design")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, ((task, design), found) in zip(axes, panels.items(), strict=True):
        for method, sizes in accuracies(found).items():
            means, halves = [v.mean for v in sizes.values()], [v.half or 0.0 for v in sizes.values()]
            axis.errorbar(list(sizes), means, halves, marker="o", capsize=3, label=method)
        start = estimate([float(row["start"]["accuracy"]) for row in found]).mean
        axis.axhline(start, color="black", linestyle=":", label="before")
        axis.set_xscale("log", base=2)
        axis.set(title=f"{task}, {design}", xlabel="completions of a prompt")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out prompts")
    axes[0].legend(fontsize=8)


ABOUT = f"""
Figure 3 of the paper: k completions of each prompt, GVPO above GRPO at every k and rising. Here k is {GROUP_SIZES[0]}
to {GROUP_SIZES[-1]} in two designs, both of {UPDATES} updates, {UPDATES_A_ROLLOUT} of them a rollout. *Equal prompts*:
{PROMPTS} prompts an update, so that completions, and the time they take, grow with k. *Equal samples*: {SAMPLES}
completions an update, so {SAMPLES} / k prompts, from {SAMPLES // GROUP_SIZES[0]} to {SAMPLES // GROUP_SIZES[-1]}; what
k brings is then at the cost of fewer different prompts. One learning rate
(GVPO {LEARNING_RATES["GVPO"]:g}, GRPO {LEARNING_RATES["GRPO"]:g}, linear to zero), not tuned for each k; GVPO's beta
is {METHODS["GVPO"]["model.beta"]}, GRPO's KL coefficient {METHODS["GRPO"]["model.beta"]}, the reference frozen.
`sums_small` has a smaller policy for the same sums. With `--config` the prompts, or the completions, of an update are
the config's.
"""
EXPERIMENT = Experiment("group_size", "Figure 3: how much the group size brings", ABOUT, run, table, claims, plot)
