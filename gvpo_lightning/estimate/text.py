"""Estimates as text."""

from gvpo_lightning.estimate.facts import RunFacts
from gvpo_lightning.estimate.memory import TERMS, Memory

GIB = 2**30


def describe(estimate: Memory, facts: RunFacts) -> str:
    """Memory per GPU as a table of at most ten lines: a row a term, a column a phase, GiB."""
    spread = f"{facts.strategy}, tensor parallel {facts.tensor_parallel}" if facts.num_gpus > 1 else "one device"
    lines = [f"Estimated GiB on each of {facts.num_gpus} ({spread}); peak {estimate.peak / GIB:.2f}"]
    lines.append(" " * 16 + "".join(f"{phase:>11}" for phase in estimate.phases))
    for term in TERMS:
        values = [phase.get(term, 0) for phase in estimate.phases.values()]
        if any(values):
            lines.append(f"{term:<16}" + "".join(f"{value / GIB:11.2f}" if value else " " * 11 for value in values))
    lines.append("host, a node: " + ", ".join(f"{name} {value / GIB:.2f}" for name, value in estimate.host.items()))
    return "\n".join(lines)
