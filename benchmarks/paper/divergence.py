"""When a run counts as diverged: bounds that were set before any run was looked at."""

from benchmarks.paper.cells import Row

LOST = 0.5  # of a run's best accuracy, the start's included: what ends below it has lost what it knew
FAR = 2.0  # nats a token from the start; to be right always needs about 0.6 of the sums' policy
LEARNED = 0.1  # of accuracy above the start, at some time: the run has learned something
RULE = (
    f"A run counts as diverged if it was stopped (6 updates in a row not finite), if it ends below {LOST:g} of its own "
    f"best accuracy, or if it ends more than {FAR:g} nats a token from where it started (KL). It has learned if its "
    f"best accuracy is at least {LEARNED:g} above its start."
)


def divergence(row: Row) -> str | None:
    """Why a run counts as diverged, or None."""
    if row["stopped"]:
        return "stopped"
    end, best = row["end"], best_accuracy(row)
    if end["accuracy"] < LOST * best:
        return f"accuracy {best:.2f} -> {end['accuracy']:.2f}"
    if end["kl"] > FAR * end["length"]:
        return f"KL {end['kl'] / end['length']:.1f} nats a token"
    return None


def best_accuracy(row: Row) -> float:
    """The highest that was measured, at the start, on the way or at the end."""
    return max(float(at["accuracy"]) for at in (row["start"], *row["evaluations"], row["end"]))


def has_learned(row: Row) -> bool:
    """Whether it was better than its start at some time."""
    return best_accuracy(row) >= row["start"]["accuracy"] + LEARNED
