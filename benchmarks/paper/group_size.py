"""Figure 3 of the paper: how much the number of completions of a prompt brings."""

import math
import statistics
from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.prepare import Configs, setting
from benchmarks.paper.tables import (
    LEVEL,
    Claim,
    Estimate,
    bonferroni,
    count_stopped,
    decide,
    decide_all,
    draw_line,
    end,
    estimate,
    group_by,
    markdown,
    paired_difference,
)

GROUP_SIZES = (2, 4, 16, 64)
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
        for (method,), same in group_by(found, "method").items():
            sizes = accuracies(found)[method]
            lines.append([task, design, f"{method}{count_stopped(same)}", *(sizes.get(k, "") for k in GROUP_SIZES)])
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
        found += [*above(same, f"{task}, {design}"), *rising(same, f"{task}, {design}")]
    small = [row for row in rows if row["labels"]["task"] == "sums_small"]
    large = [row for row in rows if row["labels"]["task"] == "sums" and row["labels"]["design"] == PROMPTS_HELD]
    return [*found, *reaches(small, large)] if small and large else found


def above(rows: list[Row], where: str) -> list[Claim]:
    """GVPO - GRPO at each group size; fails where one lies below 0 at 95% for all sizes together."""
    groups = group_by(rows, "method", "group_size")
    gaps = {
        size: paired_difference(of_gvpo, groups[("GRPO", size)], end("accuracy"))
        for (method, size), of_gvpo in groups.items()
        if method == "GVPO" and ("GRPO", size) in groups
    }
    if not gaps:
        return []
    shown = ", ".join(f"k = {size}: {gap}" for size, gap in gaps.items())
    says = f"GVPO is above GRPO at every group size ({', '.join(map(str, gaps))})"
    level = f"contradicted only at {bonferroni(len(gaps)):.1%} for one size, which is {LEVEL:.0%} for all"
    return [Claim(says, f"{where}: GVPO - GRPO is {shown}; {level}", decide_all(list(gaps.values()), decide))]


def rising(rows: list[Row], where: str) -> list[Claim]:
    """The slope of GVPO's accuracy over log2 of the group size, of each seed that has all sizes."""
    ours = [row for row in rows if row["labels"]["method"] == "GVPO"]
    sizes, seeds = sorted({row["labels"]["group_size"] for row in ours}), {row["seed"] for row in ours}
    if len(sizes) < 2:
        return []
    slope = estimate([slope_of([row for row in ours if row["seed"] == seed], sizes) for seed in sorted(seeds)])
    shown = ", ".join(f"{size}: {value}" for size, value in sorted(accuracies(rows)["GVPO"].items()))
    says = f"GVPO's accuracy rises with the group size from {sizes[0]} to {sizes[-1]} (trend over all sizes)"
    return [Claim(says, f"{where}: by {slope} for each doubling; {shown}", decide(slope))]


def slope_of(rows: list[Row], sizes: list[int]) -> float:
    """Accuracy gained with each doubling of the group size, by least squares; NaN where a size is missing."""
    values = {row["labels"]["group_size"]: end("accuracy")(row) for row in rows}
    heights = [values.get(size, math.nan) for size in sizes]
    if not all(map(math.isfinite, heights)):
        return math.nan
    return statistics.linear_regression([math.log2(size) for size in sizes], heights).slope


def reaches(small: list[Row], large: list[Row]) -> list[Claim]:
    """The small policy's largest group size against the large policy's smallest, at equal prompts."""
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
    says = "A small policy with large groups reaches a large one with small groups (ends above it; no margin)"
    measured = (
        f"k = {most} of the small policy: {of_small[most]} (from {starts[0]:.3f}); "
        f"k = {least} of the large one: {of_large[least]} (from {starts[1]:.3f}); difference {gap}"
    )
    return [Claim(says, measured, decide(gap), "ours")]


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy over group sizes, a panel for each task and design."""
    panels = group_by(rows, "task", "design")
    axes = figure.subplots(1, max(1, len(panels)), sharey=True, squeeze=False)[0]
    for axis, ((task, design), found) in zip(axes, panels.items(), strict=False):
        axis.set(xscale="log", xlim=(GROUP_SIZES[0] / 1.3, GROUP_SIZES[-1] * 1.3))
        axis.set_xticks(GROUP_SIZES, list(map(str, GROUP_SIZES)))
        for method, sizes in accuracies(found).items():
            draw_line(axis, sizes, method)
        start = estimate([float(row["start"]["accuracy"]) for row in found]).mean
        axis.axhline(start, color="black", linestyle=":", label="before")
        axis.set(title=f"{task}, {design}", xlabel="completions of a prompt")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out prompts")
    axes[0].legend(fontsize=8)


TEXT_OF_SIZES = ", ".join(map(str, GROUP_SIZES))
ABOUT = f"""
Figure 3 of the paper: k completions of each prompt, GVPO above GRPO at every k and rising with it. Here k is
{TEXT_OF_SIZES} in two designs, both of {UPDATES} updates, {UPDATES_A_ROLLOUT} of them a rollout. *Equal prompts*:
{PROMPTS} prompts an update, so that completions, and the time they take, grow with k. *Equal samples*: {SAMPLES}
completions an update, so {SAMPLES} / k prompts, from {SAMPLES // GROUP_SIZES[0]} to {SAMPLES // GROUP_SIZES[-1]}; what
k brings is then at the cost of fewer different prompts. One learning rate
(GVPO {LEARNING_RATES["GVPO"]:g}, GRPO {LEARNING_RATES["GRPO"]:g}, linear to zero), not tuned for each k; GVPO's beta
is {METHODS["GVPO"]["model.beta"]}, GRPO's KL coefficient {METHODS["GRPO"]["model.beta"]}, the reference frozen.
Whether accuracy rises is one test: the slope over log2 k, fitted to each seed's accuracies, and its interval over
seeds. `sums_small` has a smaller policy for the same sums: whether it reaches, with the largest k, the larger policy
with the smallest is a question of this page, not of the paper; it does if the interval of the difference lies above 0,
does not if it lies below, and otherwise is not decided. With `--config` the prompts, or the completions, of an update
are the config's.
"""
EXPERIMENT = Experiment("group_size", "Figure 3: how much the group size brings", ABOUT, run, table, claims, plot)
