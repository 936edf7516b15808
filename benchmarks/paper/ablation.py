"""The paper's ablation: what GVPO is without its variance term, without its covariance term, and without both."""

from typing import Any

from benchmarks.paper.cells import Execute, Row
from benchmarks.paper.divergence import RULE, best_accuracy, divergence, has_learned, largest_of
from benchmarks.paper.experiment import Experiment
from benchmarks.paper.options import CONSTANT, TASKS, Options
from benchmarks.paper.prepare import setting
from benchmarks.paper.tables import Claim, curve, end, estimate, group_by, markdown

WHOLE = "GVPO"
VARIANTS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "without Var": {"model.objective": {"kind": "gvpo", "variance_term": False}},
    "without Cov": {"model.objective": {"kind": "gvpo", "covariance_term": False}},
    "without both": {"model.objective": {"kind": "gvpo", "variance_term": False, "covariance_term": False}},
}
SAYS = {
    WHOLE: "Whole GVPO does not diverge",
    "without Var": "Without the variance term training diverges",
    "without Cov": "Without the covariance term training diverges",
    "without both": "Without both terms training first learns, then diverges",
}
REFERENCES = ("previous", "frozen")
OF_THE_PAPER = "previous"
SEEDS = (0, 1)
UPDATES, EVALUATIONS = 120, 5
LEARNING_RATES, BETA = (3e-4, 1e-3), 0.1
LABELS = ("task", "learning_rate", "reference", "variant")
PROMPTS, COMPLETIONS = (
    setting(TASKS["sums"], f"model.rollout.{name}", 8) for name in ("prompts_per_update", "group_size")
)
UPDATES_A_ROLLOUT = setting(TASKS["sums"], "model.rollout.prompts_per_rollout", 32) // PROMPTS
CURVES = (("accuracy", "accuracy"), ("entropy", "entropy, nats a token"), ("kl", "KL to the start, nats"))


def run(options: Options, execute: Execute) -> None:
    """Every variant with every reference, at every learning rate and on every seed."""
    rates = options.learning_rates or ((None,) if options.configs else LEARNING_RATES)  # None = the config's
    cells = [
        options.cell(
            configs,
            {"task": task, "learning_rate": rate, "reference": reference, "variant": variant},
            {"model.reference": reference, "model.beta": BETA} | settings | ({} if options.configs else CONSTANT),
            seed,
            updates=UPDATES,
            learning_rate=rate,
            meter={"evaluations": EVALUATIONS, "completions": 4},
        )
        for task, configs in options.tasks("sums").items()
        for rate in rates
        for reference in REFERENCES
        if rate != LEARNING_RATES[0] or reference == REFERENCES[0]  # the smallest is for the paper's reference alone
        for variant, settings in VARIANTS.items()
        for seed in options.seeds or SEEDS
    ]
    execute(cells)


def table(rows: list[Row]) -> str:
    """Best and last accuracy, and how far it went."""
    lines = []
    for labels, found in group_by(rows, *LABELS).items():
        measured = [estimate([best_accuracy(row) for row in found])]
        measured += [estimate([end(name)(row) for row in found]) for name in ("accuracy", "entropy", "kl")]
        largest = max((largest_of(row, "log_ratio_max") for row in found), default=0.0)
        lines.append([*labels, *measured, f"{largest:.1f}", count_diverged(found)])
    header = ["task", "learning rate", "reference", "objective", "best accuracy", "at the end"]
    header += ["entropy, nats a token", "KL to the start, nats", "largest log-ratio in training, nats", "diverged"]
    return markdown(header, lines)


def count_diverged(rows: list[Row]) -> str:
    """How many, and why."""
    reasons = [reason for row in rows if (reason := divergence(row))]
    return f"{len(reasons)} of {len(rows)}" + (f" ({'; '.join(reasons)})" if reasons else "")


def claims(rows: list[Row]) -> list[Claim]:
    """The paper's four with the previous policy as reference, and the same of the frozen one."""
    found = []
    for (task, rate, reference, variant), same in group_by(rows, *LABELS).items():
        diverged = [divergence(row) is not None for row in same]
        seen = [not value for value in diverged] if variant == WHOLE else diverged
        if variant == "without both":
            seen = [value and has_learned(row) for value, row in zip(diverged, same, strict=True)]
        way = f"accuracy {estimate([row['start']['accuracy'] for row in same]).mean:.3f} at the start, "
        way += f"{estimate([best_accuracy(row) for row in same])} at best, "
        way += f"{estimate([end('accuracy')(row) for row in same])} at the end"
        measured = f"{task}: {count_diverged(same)} diverged, {way}"
        source = "paper" if reference == OF_THE_PAPER else "ours"
        where = f"(reference: {reference}, {rate_text(rate)})"
        found.append(Claim(f"{SAYS[variant]} {where}", measured, unanimous(seen), source))
    return found


def unanimous(seen: list[bool]) -> bool | None:
    """What all runs show; None where they disagree, or there is one alone."""
    if len(seen) < 2:
        return None
    return True if all(seen) else None if any(seen) else False


def rate_text(rate: float | None) -> str:
    """A learning rate, in words."""
    return "the config's learning rate" if rate is None else f"learning rate {rate:g}"


def plot(rows: list[Row], figure: Any) -> None:
    """Accuracy, entropy and KL over updates, means over seeds; dashed with the frozen reference."""
    rates = group_by(rows, "learning_rate")
    figure.set_size_inches(12, 3.6 * len(rates))
    all_axes = figure.subplots(len(rates), len(CURVES), squeeze=False)
    for axes, ((rate,), found) in zip(all_axes, rates.items(), strict=True):
        for axis, (name, label) in zip(axes, CURVES, strict=True):
            for (reference, variant), same in group_by(found, "reference", "variant").items():
                points = curve(same, name)
                color = f"C{list(VARIANTS).index(variant)}"
                style = "-" if reference == REFERENCES[0] else "--"
                axis.plot(list(points), list(points.values()), style, color=color, label=f"{variant}, {reference}")
            axis.set(xlabel="update", ylabel=label, title=rate_text(rate))
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=7)


ABOUT = f"""
GVPO's loss is a reward term, a variance term (against collapse: it keeps exploring) and a covariance term (near the
reference). The paper leaves out one or both, with the previous policy as the reference. Here that, and, as a question
of this page, the same with the frozen one: {UPDATES} updates of {PROMPTS} prompts with {COMPLETIONS} completions,
{UPDATES_A_ROLLOUT} updates a rollout, beta {BETA:g}, and a learning rate that stays at
{" or ".join(f"{rate:g}" for rate in LEARNING_RATES)} (with the frozen one at the larger alone), since
one that falls to zero would hide divergence. What the loss itself says: without the variance term (and without both) it
is linear in the policy's log-probs, so unbounded below, and nothing but the end of training stops it; without the
covariance term it is bounded, and has an optimum, exp(R / beta) / Z, in which the reference does not occur: nothing
holds it near its start, but it need not lose accuracy. {RULE} {len(SEEDS)} seeds give no interval worth the name: a
claim is decided where all runs diverged, or none.
"""
EXPERIMENT = Experiment("ablation", "The ablation: without Var, without Cov", ABOUT, run, table, claims, plot)
