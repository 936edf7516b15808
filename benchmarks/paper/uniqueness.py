"""One optimum: policies that start elsewhere, and learn from other samples, end as the same policy."""

from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell, Execute, Row
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import METHODS, Options
from benchmarks.paper.pairs import (
    COMPLETIONS,
    PROMPTS,
    SPLITS,
    add_distances,
    all_pairs,
    by_method,
    measure,
    pairs,
    shown,
    start_pairs,
    to_optimum,
)
from benchmarks.paper.prepare import Configs, make_start, record, run_apart, setting
from benchmarks.paper.tables import Claim, Estimate, estimate, markdown

SEEDS = (0, 1, 2, 3, 4)  # of the starts, and of their runs
NOISE = 0.5  # on each weight, in units of its matrix's RMS
BETA = 1.0  # of all methods
UPDATES = 120
LEARNING_RATE = 5e-4
IN_FILE = 32  # completions of a prompt
SELF, FILE, HOT = "own", "file", "hot + own"
HOT_TEMPERATURE = 1.5
SAMPLERS = {"GVPO": (SELF, FILE, HOT), "DPO": (SELF, FILE, HOT), "GRPO": (SELF,)}
NEAR = 0.05  # nats a completion: as good as the same policy
SHRINKS = 0.1  # of the starts' distance from each other
FACTOR = 2.0  # how much further apart another method's policies are, to be called so


def run(options: Options, execute: Execute) -> None:
    """Starts, files, training from each start with each sampler, and the distances, which rows take up."""
    for task, configs in options.tasks("sums").items():
        folder = options.folder / f"uniqueness_{task}"
        seeds = options.seeds or SEEDS
        run_apart([(make_start, (configs, folder / f"start{seed}", NOISE, seed)) for seed in seeds])
        large = {} if options.configs else {"model.rollout.group_size": IN_FILE}
        files = {
            FILE: record(configs, folder / "file", large),
            HOT: record(configs, folder / "hot", large | {"model.generation.temperature": HOT_TEMPERATURE}),
        }
        cells = [
            make_cell(options, configs, folder, (task, method, sampler), files.get(sampler), seed)
            for method, samplers in SAMPLERS.items()
            for sampler in samplers
            for seed in seeds
        ]
        rows = execute(cells)
        folders = {cell.key: f"{cell.keep}/export" for cell in cells}
        starts = {row["settings"]["model.policy"]: row["labels"]["start"] for row in rows}
        groups = {"starts": list(starts)}
        for row in rows:
            if row["stopped"] is None:  # of a policy that has diverged there is no export
                groups.setdefault(row["labels"]["method"], []).append(folders[row["key"]])
        found = measure(configs, groups, BETA, cells[0].meter["answers"], jobs=1 if options.configs else len(SPLITS))
        for split, distances in found.items():
            add_distances(rows, list(starts), split, distances)


def make_cell(
    options: Options, configs: Configs, folder: Path, names: tuple[str, str, str], file: Path | None, seed: int
) -> Cell:
    """Training from one start; `names` are task, method and sampler, and `file` what the sampler takes."""
    task, method, sampler = names
    settings = METHODS[method] | {
        "model.beta": BETA,
        "model.policy": str(folder / f"start{seed}"),
        "model.reference": {"kind": "frozen", "model": setting(configs, "model.policy", None)},
    }
    if sampler == FILE:
        settings["model.sources"] = {"policy": 0, "file": {"path": str(file), "count": 1.0}}
    elif sampler == HOT:
        settings["model.sources"] = {"file": {"path": str(file), "count": 0.5}}
    labels = {"task": task, "method": method, "sampler": sampler, "start": seed}
    rate = None if options.configs else LEARNING_RATE
    keep = str(folder / f"{method}_{sampler.replace(' + ', '_')}_{seed}")
    return options.cell(configs, labels, settings, seed, updates=UPDATES, learning_rate=rate, keep=keep)


def table(rows: list[Row]) -> str:
    """Distances in nats a completion, mean and largest, on prompts that were trained and on others."""
    lines, methods = [], by_method(rows)
    some = next(iter(methods.values()), [])
    for split in SPLITS:
        before = [shown(start_pairs(some, split)), "", "", shown(to_optimum(some, split, "start_optimum"))]
        lines.append([split, "the starts", *before, ""])
        for method, same in methods.items():
            kinds = [shown(pairs(same, split, *kind)) for kind in ((False, True), (True, False), (False, False))]
            accuracy = estimate([float(row["end"]["accuracy"]) for row in same])
            lines.append([split, method, *kinds, shown(to_optimum(same, split)), f"{accuracy.mean:.3f}"])
    header = ["prompts", "policies", "other start", "other sampler", "both other", "to the closed form", "accuracy"]
    return "KL in nats a completion: mean (largest); accuracy is on held-out prompts.\n\n" + markdown(header, lines)


def claims(rows: list[Row]) -> list[Claim]:
    """GVPO's policies are one, the closed form's; DPO's and GRPO's are further apart."""
    found, split = [], SPLITS[0]
    methods = by_method(rows)
    ours = methods.get("GVPO", [])
    optimum, spread, before = to_optimum(ours, split), all_pairs(ours, split), start_pairs(ours, split)
    if optimum:
        says = f"Whoever starts and samples, GVPO ends at the closed form: each policy within {NEAR} nats of it"
        found.append(Claim(says, f"{len(optimum)} policies, mean and largest: {shown(optimum)}", max(optimum) < NEAR))
    if spread and before:
        says = f"GVPO's policies end at one: their distances fall below {SHRINKS} of the starts' (means)"
        text = f"from {shown(before)} to {shown(spread)} nats"
        found.append(Claim(says, text, estimate(spread).mean < SHRINKS * estimate(before).mean))
    for method in ("DPO", "GRPO"):
        own = [row for row in ours if row["labels"]["sampler"] in SAMPLERS[method]]
        theirs, mine = all_pairs(methods.get(method, []), split), all_pairs(own, split)
        if theirs and mine:
            found.append(further_apart(method, estimate(theirs), estimate(mine)))
    return found


def further_apart(method: str, theirs: Estimate, mine: Estimate) -> Claim:
    """Whether a method's policies are `FACTOR` times as far from each other as GVPO's; undecided down to as far."""
    says = f"{SAYS[method]}: its policies stay further apart than GVPO's with the same samplers (by {FACTOR} and more)"
    text = f"{method} {theirs.mean:.4f}, GVPO {mine.mean:.4f} nats on average"
    holds = True if theirs.mean > FACTOR * mine.mean else False if theirs.mean <= mine.mean else None
    return Claim(says, text, holds)


SAYS = {
    "DPO": "The paper says that DPO lacks a unique optimum",
    "GRPO": "GRPO is given no promise of one",
}


def plot(rows: list[Row], figure: Any) -> None:
    """All distances, on a logarithmic axis: between policies on the left, to the closed form on the right."""
    axes = figure.subplots(1, 2, sharey=True)
    methods = by_method(rows)
    some = next(iter(methods.values()))
    split = SPLITS[0]
    between = {"starts": start_pairs(some, split)} | {name: all_pairs(same, split) for name, same in methods.items()}
    optimum = {"starts": to_optimum(some, split, "start_optimum")} | {
        name: to_optimum(same, split) for name, same in methods.items()
    }
    for axis, values, title in ((axes[0], between, "between policies"), (axes[1], optimum, "to the closed form")):
        for number, kls in enumerate(values.values()):
            axis.scatter([number + 0.3 * (i / max(len(kls), 1) - 0.5) for i in range(len(kls))], kls, s=8)
        axis.set_xticks(range(len(values)), list(values))
        axis.set(yscale="log", title=f"{title}, {split} prompts")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("KL, nats a completion")


ABOUT = f"""
GVPO's optimum is unique, whatever the policy starts as and whoever samples: two claims of the paper's theory. Here
{len(SEEDS)} policies start from the shipped one with noise on all weights ({NOISE} times each matrix's RMS, another
seed each); the reference is the shipped policy without noise for all of them, beta is {BETA}, and {UPDATES} updates
at {LEARNING_RATE:g}, linear to zero, are made with each of three samplers: *own*, the policy itself; *file*,
{IN_FILE} completions of each prompt by the reference, nothing sampled; *hot + own*, half from a file that the reference
sampled at temperature {HOT_TEMPERATURE}, half the policy's own. DPO (all pairs of a group with different rewards) is
given the same, GRPO its own samples alone. What is compared are the last policies, pair by pair: KL(p || q) in nats a
completion, from {COMPLETIONS} completions by p for each of {PROMPTS} prompts, with the KL of the two next-token
distributions, over the whole vocabulary, summed over each completion's positions. The distance to the closed form,
reference e^(R/beta) / Z with the exact Z, is the mean of log p - log reference - R / beta over the same completions,
plus log Z. Claims are about training prompts: the optimum says nothing of others, on which policies may differ.
"""
EXPERIMENT = Experiment(
    "uniqueness", "One optimum, whoever starts and whoever samples", ABOUT, run, table, claims, plot
)
