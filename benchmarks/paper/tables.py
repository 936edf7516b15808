"""Means with intervals, Markdown tables, and claims held against numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]
LEVEL = 0.95  # of intervals
COUNTDOWN = (
    "In `countdown` (reach a number with three given ones) the base has learned the rule but hardly uses it: in the "
    'later part of its warm-up half of the prompts ended in "!" instead of ":" and got right answers only, while the '
    "prompts used here end in the latter, where it was taught to be right little more often than by chance (base: 7%, "
    "chance: about 6%)."
)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, and half the width of its 95% interval (Student's t; None of one seed or none).

    Attributes:
        missing: seeds that are left out: runs that were stopped, or nothing could be measured of them.
    """

    mean: float
    half: float | None
    count: int
    missing: int = 0

    def __str__(self) -> str:
        if self.count == 0:
            return "n/a"
        text = f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"
        return f"{text} ({self.count} of {self.count + self.missing} seeds)" if self.missing else text

    def __neg__(self) -> "Estimate":
        return replace(self, mean=-self.mean)

    def at(self, level: float) -> "Estimate":
        """The same with the interval of another level."""
        if self.half is None:
            return self
        degrees = self.count - 1
        return replace(self, half=self.half * t_quantile(degrees, level) / t_quantile(degrees, LEVEL))


@dataclass(frozen=True)
class Claim:
    """What the paper says, and whether it was seen.

    Attributes:
        says: the paper's claim, or the theory's.
        measured: the numbers, in words.
        holds: True or False; None where the intervals do not decide.
        source: who says it: the "paper", the "theory" (that follows from the loss), or "ours", a question of this page.
    """

    says: str
    measured: str
    holds: bool | None
    source: str = "paper"

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return {True: "agrees", False: "**contradicts**", None: "undecided"}[self.holds]


def t_quantile(degrees: int, level: float) -> float:
    """Within which distance from 0 a variable of Student's t distribution is with probability `level`."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # bisection: of a double nothing is left to halve
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def t_probability(angle: float, degrees: int) -> float:
    """P(|t| < sqrt(degrees) tan(angle)), by the finite series for whole degrees (Abramowitz and Stegun 26.7.3-4)."""
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    even_part = math.sin(angle) * total
    return (angle + even_part) * 2 / math.pi if odd else even_part


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of the values that are finite; NaN and no interval where none is."""
    finite = [value for value in values if math.isfinite(value)]
    count, missing = len(finite), len(values) - len(finite)
    if count < 2:
        return Estimate(finite[0] if finite else math.nan, None, count, missing)
    half = t_quantile(count - 1, LEVEL) * statistics.stdev(finite) / count**0.5
    return Estimate(statistics.fmean(finite), half, count, missing)


def paired_difference(first: Sequence[Row], second: Sequence[Row], value: Callable[[Row], float]) -> Estimate:
    """The mean over seeds of first - second, whose noise in common falls out; a seed that only one has is missing."""
    mine, other = ({row["seed"]: value(row) for row in rows} for rows in (first, second))
    return estimate([mine.get(seed, math.nan) - other.get(seed, math.nan) for seed in mine | other])


def decide(difference: Estimate, margin: float = 0.0) -> bool | None:
    """Whether a difference is above -margin (True) or below it (False), if its interval tells; one seed has none."""
    half = difference.half
    if half is None:
        return None
    if difference.mean - half > -margin:
        return True
    return False if difference.mean + half < -margin else None


def decide_below(value: Estimate, bound: float) -> bool | None:
    """Whether a mean is below a bound, where its interval tells; one seed has none."""
    half = value.half
    if half is None:
        return None
    return True if value.mean + half < bound else False if value.mean - half > bound else None


def decide_within(difference: Estimate, margin: float) -> bool | None:
    """Whether a difference is within +-margin (True), or outside (False), if its interval tells; one seed has none."""
    return all_hold([decide(difference, margin), decide(-difference, margin)])


def all_hold(decisions: Sequence[bool | None]) -> bool | None:
    """True where all are, False where one is False; None of none."""
    return False if False in decisions else None if None in decisions or not decisions else True


def decide_all(estimates: Sequence[Estimate], decision: Callable[[Estimate], bool | None]) -> bool | None:
    """Whether a decision is True of all: where each says so; False where one says False at 95% for all (Bonferroni)."""
    if all_hold([decision(value) for value in estimates]):
        return True
    return False if any(decision(value.at(bonferroni(len(estimates)))) is False for value in estimates) else None


def bonferroni(count: int) -> float:
    """The level of each of so many intervals, at which all of them hold at 95% together."""
    return 1 - (1 - LEVEL) / count


def fisher_p(first: int, second: int, first_total: int, second_total: int) -> float:
    """Two-sided p-value of Fisher's exact test: `first` of `first_total` against `second` of `second_total`."""
    together, total = first + second, first_total + second_total
    ways = {
        k: math.comb(first_total, k) * math.comb(second_total, together - k)
        for k in range(max(0, together - second_total), min(together, first_total) + 1)
    }
    return sum(count for count in ways.values() if count <= ways[first]) / math.comb(total, together)


def group_by(rows: Iterable[Row], *labels: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these labels, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["labels"].get(label) for label in labels), []).append(row)
    return groups


def as_number(value: float | None) -> float:
    """NaN of null, which files have where a number was not finite."""
    return math.nan if value is None else float(value)


def end(name: str) -> Callable[[Row], float]:
    """Reads what was measured at a run's end; NaN of a run that was stopped without."""

    def read(row: Row) -> float:
        return as_number((row["end"] or {}).get(name))

    return read


def count_stopped(rows: Iterable[Row]) -> str:
    """How many runs were stopped, in brackets; nothing where none was."""
    count = sum(row["stopped"] is not None for row in rows)
    return f" (stopped: {count})" if count else ""


def points_of(row: Row) -> list[Row]:
    """What was measured at the start, on the way and at the end, with `update`; no end of a run that has none."""
    last = max([0, *(point["update"] for point in row["trace"])])
    end_point = [row["end"] | {"update": last}] if row["end"] else []
    return [row["start"] | {"update": 0}, *row["evaluations"], *end_point]


def curve(rows: Iterable[Row], name: str) -> dict[int, float]:
    """The mean over the runs that were measured at an update, by update."""
    values: dict[int, list[float]] = {}
    for point in (point for row in rows for point in points_of(row)):
        values.setdefault(point["update"], []).append(as_number(point[name]))
    return {update: estimate(found).mean for update, found in sorted(values.items())}


def draw_line(axis: Any, points: dict[Any, Estimate], label: str) -> None:
    """Means with their intervals over whatever the keys are; those without a value are left out."""
    found = {x: value for x, value in points.items() if value.count}
    if not found:
        return
    halves = [value.half or 0.0 for value in found.values()]
    axis.errorbar(list(found), [v.mean for v in found.values()], halves, marker="o", capsize=3, label=label)


def show_predicted(row: Row) -> str:
    """The closed form's accuracy, if it is known."""
    return "" if row["predicted"] is None else f"{row['predicted']:.3f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are right-aligned by whoever shows it."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
