"""Distances between the policies of `uniqueness`, read from its rows."""

from benchmarks.paper.cells import Row
from benchmarks.paper.tables import estimate


def pairs(rows: list[Row], split: str, same_start: bool, same_sampler: bool) -> list[float]:
    """KL of all pairs of different policies of one method, with the same start or sampler or another one."""
    return [
        float(kl)
        for row in rows
        for start, sampler, kl in row["distances"][split]["to"]
        if (start, sampler) != (row["labels"]["start"], row["labels"]["sampler"])
        and (start == row["labels"]["start"]) == same_start
        and (sampler == row["labels"]["sampler"]) == same_sampler
    ]


def all_pairs(rows: list[Row], split: str) -> list[float]:
    """KL of all pairs of different policies of one method."""
    return [kl for same in ((True, False), (False, True), (False, False)) for kl in pairs(rows, split, *same)]


def start_pairs(rows: list[Row], split: str) -> list[float]:
    """KL of all pairs of different starts."""
    by_start = {row["labels"]["start"]: row["distances"][split]["start_to"] for row in rows}
    return [float(kl) for i, kls in enumerate(by_start.values()) for j, kl in enumerate(kls) if i != j]


def to_optimum(rows: list[Row], split: str, name: str = "optimum") -> list[float]:
    """KL of all policies to the closed form; empty where it is not known."""
    return [row["distances"][split][name] for row in rows if row["distances"][split][name] is not None]


def shown(values: list[float]) -> str:
    """Mean and largest."""
    return f"{estimate(values).mean:.4f} ({max(values):.4f})" if values else ""
