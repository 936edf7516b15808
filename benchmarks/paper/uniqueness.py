"""One optimum: policies that start elsewhere, and learn from other samples, end as the same policy."""

from collections.abc import Callable
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
    among,
    by_method,
    measure,
    pairs,
    shown,
    start_pairs,
    to_optimum,
)
from benchmarks.paper.prepare import Configs, make_start, record, run_apart, setting
from benchmarks.paper.tables import (
    Claim,
    Estimate,
    count_stopped,
    decide,
    decide_below,
    end,
    estimate,
    group_by,
    markdown,
)

SEEDS = (0, 1, 2, 3, 4)  # of the starts, and of their runs
NOISE = 0.5  # on each weight, in units of its matrix's RMS
BETA = 1.0  # of all methods
UPDATES = 120
LEARNING_RATE = 5e-4
IN_FILE = 32  # completions of a prompt
SELF, FILE, HOT = "own", "file", "hot + own"
HOT_TEMPERATURE = 1.5
SAMPLERS = {"GVPO": (SELF, FILE, HOT), "DPO": (SELF, FILE, HOT), "GRPO": (SELF,)}
SPLIT = SPLITS[0]  # that claims are about
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
        for (method,), all_runs in group_by(rows, "method").items():
            same = methods.get(method, [])
            kinds = [shown(pairs(same, split, *kind)) for kind in ((False, True), (True, False), (False, False))]
            accuracy = estimate([end("accuracy")(row) for row in same])
            mean = f"{accuracy.mean:.3f}" if accuracy.count else "n/a"
            lines.append([split, f"{method}{count_stopped(all_runs)}", *kinds, shown(to_optimum(same, split)), mean])
    header = ["prompts", "policies", "other start", "other sampler", "both other", "to the closed form", "accuracy"]
    return "KL in nats a completion: mean (largest); accuracy is on held-out prompts.\n\n" + markdown(header, lines)


def claims(rows: list[Row]) -> list[Claim]:
    """GVPO's policies are one, the closed form's; DPO's and GRPO's are further apart."""
    found = []
    methods = by_method(rows)
    ours = methods.get("GVPO", [])
    optimum = to_optimum(ours, SPLIT)
    if optimum:
        mean = of_starts(ours, lambda same: to_optimum(same, SPLIT))
        says = f"Whoever starts and samples, GVPO ends at the closed form: within {NEAR} nats of it on average"
        stopped = count_stopped(row for row in rows if row["labels"]["method"] == "GVPO")
        text = f"{mean} nats; the largest of {len(optimum)} policies {max(optimum):.3f}{stopped}"
        found.append(Claim(says, text, decide_below(mean, NEAR), "theory"))
    if all_pairs(ours, SPLIT) and start_pairs(ours, SPLIT):
        after, before = of_starts(ours, between), of_starts(ours, lambda same: start_pairs(same, SPLIT))
        left = of_starts(ours, between, lambda same: start_pairs(same, SPLIT), SHRINKS)
        says = f"GVPO's policies end at one: their distances fall below {SHRINKS} of the starts' (means)"
        found.append(Claim(says, f"from {before} to {after} nats", decide_below(left, 0.0), "theory"))
    for method in ("DPO", "GRPO"):
        own = among(ours, SAMPLERS[method])
        theirs = methods.get(method, [])
        if all_pairs(theirs, SPLIT) and all_pairs(own, SPLIT):
            found.append(further_apart(method, theirs, own))
    return found


def between(rows: list[Row]) -> list[float]:
    """The distances from some policies to all others of their method."""
    return all_pairs(rows, SPLIT)


Distances = Callable[[list[Row]], list[float]]


def of_starts(rows: list[Row], first: Distances, second: Distances | None = None, factor: float = 0.0) -> Estimate:
    """Over starts: the mean distance of the policies from one, minus `factor` times another mean."""
    groups = group_by(rows, "start").values()
    return estimate([mean_of(first(same)) - (factor * mean_of(second(same)) if second else 0.0) for same in groups])


def mean_of(values: list[float]) -> float:
    """NaN of none."""
    return estimate(values).mean


def further_apart(method: str, theirs: list[Row], mine: list[Row]) -> Claim:
    """Whether a method's policies are `FACTOR` times as far from each other as GVPO's, start by start."""
    means = [
        {start: mean_of(between(same)) for (start,), same in group_by(of, "start").items()} for of in (theirs, mine)
    ]
    both = [start for start in means[0] if start in means[1]]
    difference = estimate([means[0][start] - FACTOR * means[1][start] for start in both])
    says = f"{SAYS[method]}: its policies stay further apart than GVPO's with the same samplers (by {FACTOR} and more)"
    text = f"{method} {of_starts(theirs, between)}, GVPO {of_starts(mine, between)} nats on average; "
    text += f"{method} - {FACTOR:g} x GVPO: {difference}"
    return Claim(says, text, decide(difference), "paper" if method == "DPO" else "ours")


SAYS = {
    "DPO": "The paper says that DPO lacks a unique optimum",
    "GRPO": "GRPO is given no promise of one",
}


def plot(rows: list[Row], figure: Any) -> None:
    """All distances, on a logarithmic axis: between policies on the left, to the closed form on the right."""
    axes = figure.subplots(1, 2, sharey=True)
    methods = by_method(rows)
    some = next(iter(methods.values()), [])
    apart = {"starts": start_pairs(some, SPLIT)} | {name: between(same) for name, same in methods.items()}
    optimum = {"starts": to_optimum(some, SPLIT, "start_optimum")} | {
        name: to_optimum(same, SPLIT) for name, same in methods.items()
    }
    for axis, values, title in ((axes[0], apart, "between policies"), (axes[1], optimum, "to the closed form")):
        axis.set(yscale="log", title=f"{title}, {SPLIT} prompts")
        for number, found in enumerate(values.values()):
            kls = [kl for kl in found if kl > 0]  # an estimate of nearly 0 may be below it
            axis.scatter([number + 0.3 * (i / max(len(kls), 1) - 0.5) for i in range(len(kls))], kls, s=8)
        axis.set_xticks(range(len(values)), list(values))
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
plus log Z. Claims are about training prompts: the optimum says nothing of others, on which policies may differ. They
are decided by intervals over the {len(SEEDS)} starts, of each start's mean distance; pairs of policies have a start in
common, so that these intervals are somewhat too narrow.

"Whoever starts" was found to hold for starts that keep some structure. Trials with noise of 0.7 and more of the
weights' RMS, at larger learning rates than here, fell to 3% right and did not recover in as many updates: the optimum
is the same for them, but training did not reach it.
"""
EXPERIMENT = Experiment(
    "uniqueness", "One optimum, whoever starts and whoever samples", ABOUT, run, table, claims, plot
)
