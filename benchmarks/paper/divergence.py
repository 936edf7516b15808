"""When a run counts as diverged: bounds that were set before any run was looked at."""

import inspect
import math

from benchmarks.paper.cells import Row
from benchmarks.paper.tables import as_number, points_of
from gvpo_lightning.module import GVPOModule

LOST = 0.5  # of a run's best accuracy, the start's included: what ends further below it has lost what it knew
FAR = 2.0  # nats a token from the start; to be right always needs about 0.6 of the sums' policy
LEARNED = 0.1  # of accuracy above the start, at some time: the run has learned something
SKIPPED = inspect.signature(GVPOModule.__init__).parameters["max_skipped_updates"].default + 1  # the last one stops
RULE = (
    f"A run counts as diverged if it was stopped ({SKIPPED} updates in a row not finite), if it ends "
    f"below {LOST:g} of its own best accuracy, or if it ends more than {FAR:g} nats a token from where it started "
    f"(KL). It has learned if its best accuracy is at least {LEARNED:g} above its start."
)


def divergence(row: Row) -> str | None:
    """Why a run counts as diverged, or None.

    Rewards may be negative: what counts is the loss against the larger of the best one's size and the start's, which
    for accuracies is the best accuracy.
    """
    if row["stopped"] or row["end"] is None:
        return "stopped"
    end, best = row["end"], best_accuracy(row)
    if not all(math.isfinite(as_number(end[name])) for name in ("accuracy", "kl")):
        return "not finite"
    if best - end["accuracy"] > LOST * max(abs(best), abs(row["start"]["accuracy"])):
        return f"accuracy {best:.2f} -> {end['accuracy']:.2f}"
    if end["kl"] > FAR * end["length"]:
        return f"KL {end['kl'] / end['length']:.1f} nats a token"
    return None


def best_accuracy(row: Row) -> float:
    """The highest that was measured, at the start, on the way or at the end."""
    return max(value for at in points_of(row) if math.isfinite(value := as_number(at["accuracy"])))


def has_learned(row: Row) -> bool:
    """Whether it was better than its start at some time."""
    return best_accuracy(row) >= row["start"]["accuracy"] + LEARNED


def largest_of(row: Row, name: str) -> float:
    """Of the whole trace, of what is a number; 0 without any."""
    return max((value for at in row["trace"] if not math.isnan(value := as_number(at[name]))), default=0.0)
