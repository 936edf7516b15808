"""What an experiment is, and how one is run, shown and kept."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.paper.cells import Execute, Row, commit, config_texts, run_cells
from benchmarks.paper.options import Options
from benchmarks.paper.tables import Claim
from benchmarks.recording import RESULTS, Recording

PAGE_RESULTS = RESULTS / "paper"


@dataclass(frozen=True)
class Experiment:
    """One of the paper's tables or figures.

    Attributes:
        name: of the command and of its files.
        title: of its section.
        about: what is compared and how, as Markdown.
        run: runs its cells, through the `execute` that it is given.
        table: of the rows, as Markdown.
        claims: of the rows.
        plot: draws the rows on an empty matplotlib Figure.
    """

    name: str
    title: str
    about: str
    run: Callable[[Options, Execute], Any]
    table: Callable[[list[Row]], str]
    claims: Callable[[list[Row]], list[Claim]]
    plot: Callable[[list[Row], Any], None]


def perform(experiment: Experiment, options: Options, output: Path, jobs: int, resume: bool) -> list[Row]:
    """Run an experiment; `output`.json is written cell by cell, `output`.md and .png at its end."""
    recording = Recording(output.with_suffix(".json"), "cuda" if torch.cuda.is_available() else "cpu")
    if resume and recording.path.exists():
        recording.rows = recording.read_rows()
    configs: dict[str, Any] = {}  # read when a cell takes one
    shown = {name: value for name, value in asdict(options).items() if name != "folder"}
    recording.header |= {
        "experiment": experiment.name,
        "commit": commit(),
        "options": shown,
        "configs": configs,
    }
    rows: list[Row] = []

    def execute(cells: Any) -> list[Row]:
        print(f"{len(cells)} runs", flush=True)
        configs.update(config_texts({path for cell in cells for path in cell.configs}))
        found = run_cells(cells, recording, jobs, show)
        rows.extend(row for row in found if row not in rows)
        return found

    experiment.run(options, execute)
    rows = json.loads(json.dumps(rows).replace(str(options.folder), "FOLDER"))  # which is gone by then
    recording.rows = rows  # in the experiment's order, without those of other options
    conclude(experiment, recording, output)
    return rows


def conclude(experiment: Experiment, recording: Recording, output: Path) -> None:
    """Write claims into `output`.json, and the table and the figure beside it, from the rows."""
    recording.header["claims"] = [asdict(claim) for claim in experiment.claims(recording.rows)]
    recording.write()
    output.with_suffix(".md").write_text(experiment.table(recording.rows) + "\n")
    draw(experiment, recording.rows, output.with_suffix(".png"))


def conclude_again(experiment: Experiment, output: Path) -> None:
    """The same of rows that were measured before, where that was to its end."""
    path = output.with_suffix(".json")
    record = json.loads(path.read_text()) if path.exists() else {}
    if "claims" in record:
        recording = Recording(path, "cpu")
        recording.rows = record.pop("rows")
        recording.header = record  # when and where they were measured
        conclude(experiment, recording, output)


def show(row: Row) -> None:
    """One line as a run ends."""
    labels = ", ".join(f"{name} {value}" for name, value in row["labels"].items())
    stopped = f", stopped: {row['stopped']}" if row["stopped"] else ""
    start, end = row["start"], row["end"]
    reached = "lost" if end is None else f"{end['accuracy']:.3f}, KL {end['kl']:.2f}"
    head = f"{labels}, seed {row['seed']}: accuracy {start['accuracy']:.3f} -> {reached}"
    print(f"{head}, {row['wall_seconds']:.0f} s{stopped}", flush=True)


def draw(experiment: Experiment, rows: list[Row], path: Path) -> None:
    """Its figure, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    experiment.plot(rows, figure)
    FigureCanvasAgg(figure).print_png(str(path))
