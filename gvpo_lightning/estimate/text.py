"""Estimates as text."""

from gvpo_lightning.estimate.facts import RunFacts
from gvpo_lightning.estimate.memory import TERMS, Memory

UNITS = {"MiB": 2**20, "GiB": 2**30}


def describe(estimate: Memory, facts: RunFacts) -> str:
    """Memory per GPU as a table of at most ten lines: a row a term, a column a phase."""
    name = "GiB" if estimate.peak >= 2**30 else "MiB"
    unit = UNITS[name]
    spread = f"each of {facts.num_gpus} devices, {facts.strategy}" if facts.num_gpus > 1 else "one device"
    if facts.tensor_parallel > 1:
        spread += f", tensor parallel over {facts.tensor_parallel}"
    lines = [f"Estimated peak on {spread}: {estimate.peak / unit:.2f} {name}, of which"]
    lines.append(" " * 16 + "".join(f"{phase:>11}" for phase in estimate.phases))
    for term in TERMS:
        values = [phase.get(term, 0) for phase in estimate.phases.values()]
        if any(values):
            lines.append(f"{term:<16}" + "".join(f"{value / unit:11.2f}" if value else " " * 11 for value in values))
    host = ", ".join(f"{term} {value / unit:.2f}" for term, value in estimate.host.items())
    return "\n".join([line.rstrip() for line in lines] + [f"In a machine's own memory: {host}"])
