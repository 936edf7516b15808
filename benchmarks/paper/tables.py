"""Means with intervals, Markdown tables, and claims held against numbers."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
# two-sided 95% quantiles of Student's t by degrees of freedom; beyond, the normal distribution's with 2% more
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` seeds, and half the width of its 95% interval (Student's t; None of one seed)."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


@dataclass(frozen=True)
class Claim:
    """What the paper says, and whether it was seen.

    Attributes:
        says: the paper's claim, or the theory's.
        measured: the numbers, in words.
        holds: True or False; None where the intervals do not decide.
    """

    says: str
    measured: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return {True: "agrees", False: "**contradicts**", None: "undecided"}[self.holds]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], None, count)
    quantile = T_QUANTILES[count - 2] if count - 2 < len(T_QUANTILES) else 2.0
    return Estimate(statistics.fmean(values), quantile * statistics.stdev(values) / count**0.5, count)


def paired_difference(first: Sequence[Row], second: Sequence[Row], value: Callable[[Row], float]) -> Estimate:
    """The mean over seeds of first - second: rows of the same seeds, whose noise in common falls out."""
    other = {row["seed"]: value(row) for row in second}
    return estimate([value(row) - other[row["seed"]] for row in first])


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


def group_by(rows: Iterable[Row], *labels: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these labels, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row["labels"].get(label) for label in labels), []).append(row)
    return groups


def end(name: str) -> Callable[[Row], float]:
    """Reads what was measured at a run's end."""
    return lambda row: float(row["end"][name])


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table; numbers are right-aligned by whoever shows it."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)
