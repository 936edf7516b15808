"""Tables and plots from the JSON files of `benchmarks.loss` and `benchmarks.train_step`; nothing is measured here."""

import json
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS

README = Path(__file__).parent.parent / "kernels" / "README.md"
START, END = "<!-- measured: python -m benchmarks.loss --table -->\n", "<!-- end of measured -->"
STEP_COLUMNS = "model|path|objective|completions|step ms|tokens / s|peak GB|loss|largest batch|tokens / s there"
HEADER = "| provider | mode | forward ms | backward ms | total / floor | extra MB | error | eager's |"
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Rows of one shape as Markdown."""
    return "\n".join([HEADER, "|---" * 8 + "|", *(line(row) for row in rows)])


def line(row: Row) -> str:
    """One row; a provider without a speed says why."""
    cells = [f"{row['provider']} ({row['implementation']})", row["mode"]]
    if row["total_ms"] is None:
        return "| " + " | ".join([*cells, row["note"] or "not timed", *[""] * 5]) + " |"
    cells += [f"{row['forward_ms']:.1f}", f"{row['backward_ms']:.1f}", f"{row['ratio_to_floor']:.2f}"]
    cells += [f"{row['peak_extra_bytes'] / 1e6:.0f}", f"{row['error']:.1e}", f"{row['eager_error']:.1e}"]
    return "| " + " | ".join(cells) + " |"


def step_table(rows: list[Row]) -> str:
    """Rows of whole optimizer steps as Markdown."""
    lines = ["| " + " | ".join(STEP_COLUMNS.split("|")) + " |", "|---" * 10 + "|"]
    for row in rows:
        name = f"{row['model']}{', LoRA' if row['lora'] else ''}, {row['dtype']}"
        cells = [name, f"{row['provider']} ({row['implementation']})", row["objective"]]
        if row["step_ms"] is None:
            cells += [row["note"] or "not measured", *[""] * 4]
        else:
            cells += [str(row["batch"]), f"{row['step_ms']:.0f}", f"{row['tokens_per_second']:,.0f}"]
            cells += [f"{row['peak_bytes'] / 1e9:.2f}", f"{row['loss']:.5g}"]
        largest = row["largest"]
        cells += [str(largest["batch"]), f"{largest['tokens_per_second']:,.0f}"] if largest else ["not measured", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shape_of(row: Row) -> tuple:
    """What the rows of one table share."""
    return tuple(row[name] for name in ("N", "H", "V", "completions", "group_size", "tied", "dtype"))


def section(path: Path, device: str) -> str:
    """A device's table: the first shape of its file, or that there is none."""
    if not path.exists():
        return f"On {device}: not measured."
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if shape_of(row) == shape_of(record["rows"][0])]
    first: dict[tuple, Row] = {}
    for row in rows:  # sweeps may have met the same shape again
        first.setdefault(tuple(row[name] for name in ("provider", "implementation", "mode")), row)
    N, H, V, *_, dtype = shape_of(rows[0])
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in ("torch", "triton"))
    title = f"{record['device']}, {record['threads']} thread(s), {versions}, {record['date']}: N = {N:,}, H = {H:,}, "
    return f"{title}V = {V:,}, {dtype}.\n\n{table(list(first.values()))}"


def step_section(path: Path, device: str) -> str:
    """A device's table of whole steps, or that there is none."""
    if not path.exists():
        return f"Whole optimizer steps (`python -m benchmarks.train_step`) on {device}: not measured."
    record = json.loads(path.read_text())
    shortest, longest = record["lengths"]
    title = (
        f"Whole optimizer steps, completions of {shortest} to {longest} tokens, {record['device']}, {record['date']}."
    )
    return f"{title}\n\n{step_table(record['rows'])}"


def update_readme(readme: Path = README, results: Path = RESULTS) -> None:
    """Replace what stands between the README's markers by tables of the results, and draw their plots."""
    sections = []
    for device, name in (("a GPU", "cuda"), ("a CPU", "cpu")):
        path = results / f"loss_{name}.json"
        sections.append(section(path, device))
        if path.exists() and plot(path):
            sections.append(f"![time and memory against tokens](../benchmarks/results/{path.stem}.png)")
    for device, name in (("a GPU", "cuda"), ("a CPU", "cpu")):
        sections.append(step_section(results / f"train_step_{name}.json", device))
    before, rest = readme.read_text().split(START)
    readme.write_text(before + START + "\n" + "\n\n".join(sections) + "\n\n" + END + rest.split(END)[1])


def plot(path: Path) -> bool:
    """Time and memory against tokens as a PNG beside the JSON; False if it has no two numbers of tokens."""
    rows = json.loads(path.read_text())["rows"]
    same = [row for row in rows if row["total_ms"] is not None and shape_of(row)[1:] == shape_of(rows[0])[1:]]
    curves: dict[str, dict[int, Row]] = {}
    for row in same:
        curves.setdefault(f"{row['provider']} ({row['implementation']}), {row['mode']}", {}).setdefault(row["N"], row)
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    if not curves:
        return False
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, (field, label) in zip(
        axes, (("total_ms", "forward + backward, ms"), ("MB", "extra memory, MB")), strict=True
    ):
        for name, points in curves.items():
            values = [_value(points[tokens], field) for tokens in sorted(points)]
            axis.plot(sorted(points), values, marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
    return True


def _value(row: Row, field: str) -> float:
    return max(row["peak_extra_bytes"] / 1e6, 0.1) if field == "MB" else row[field]
