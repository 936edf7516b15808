"""Cells: the runs that an experiment consists of. Each is one `gvpo fit` in a folder of its own.

What has been measured stays in the experiment's JSON, so that an interrupted experiment goes on with `--resume`.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor

from benchmarks.recording import Recording
from gvpo_lightning.callbacks import CompletionsTable, MemoryEstimate, RunSummary
from gvpo_lightning.cli import GVPOCLI, main

ROOT = Path(__file__).parent.parent.parent
Row = dict[str, Any]
Execute = Callable[["Sequence[Cell]"], list[Row]]
SHOWING = (CompletionsTable, MemoryEstimate, RunSummary)
STORING = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor)  # which need checkpoints or a logger
QUIET = {
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.enable_checkpointing": False,
    "trainer.logger": False,
    "trainer.check_val_every_n_epoch": 1_000_000,
    "trainer.num_sanity_val_steps": 0,
    "completions_table.every_n_steps": 1_000_000,
}


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        labels: what tells it from the experiment's other cells.
        configs: files for `gvpo fit --config`, in this order; relative ones are below the repository.
        settings: dotted keys of `gvpo fit` and values, laid over them.
        seed: of everything.
        meter: arguments of `PaperMeter`.
        keep: a folder for what the run leaves, with the trained policy in export/; None keeps nothing.
    """

    labels: dict[str, Any]
    configs: tuple[str, ...]
    settings: dict[str, Any]
    seed: int
    meter: dict[str, Any] = field(default_factory=dict)
    keep: str | None = None

    @property
    def key(self) -> str:
        """The same for the same run: changes with its settings and its config files, not with code, data or policy."""
        texts = [yaml.safe_load((ROOT / path).read_text()) for path in self.configs]
        told = [texts, self.settings, self.seed, self.meter, self.labels]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def arguments(self, folder: Path, output: Path) -> list[str]:
        """Of the `gvpo` command."""
        settings = QUIET | self.settings | {"seed_everything": self.seed, "trainer.default_root_dir": str(folder)}
        measuring = {"output": str(output)} | self.meter
        if self.keep is not None:
            measuring["export"] = str(folder / "export")
        meter = {"class_path": "benchmarks.paper.meter.PaperMeter", "init_args": measuring}
        # or a mapping would be laid over the one of a config
        first = ["--model.objective=gvpo"] if isinstance(settings.get("model.objective"), dict) else []
        return [
            "fit",
            *(f"--config={ROOT / path}" for path in self.configs),
            *first,
            *(f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()),
            f"--trainer.callbacks+={json.dumps(meter)}",
        ]


class CellCLI(GVPOCLI):
    """`gvpo fit` alone, without what measures or shows a run besides PaperMeter."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The one: a parser of each would take longer than some cells."""
        return {"fit": GVPOCLI.subcommands()["fit"]}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Without the callbacks that every other run has, and without what keeps things."""
        config = self._get(self.config_init, "trainer")
        config["callbacks"] = [c for c in config.get("callbacks") or [] if not isinstance(c, STORING)]
        trainer: Any = super().instantiate_trainer(**kwargs)
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, SHOWING)]
        return trainer


def run_cell(cell: Cell) -> Row:
    """Train it; the row of the results, with `start`, `end`, `trace` and `evaluations` of `PaperMeter`.

    Raises:
        RuntimeError: the run failed by more than a policy that diverged; with the end of what it printed.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for name in ("lightning.pytorch", "lightning.fabric"):  # whose handlers keep the stream that they began with
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        folder = Path(cell.keep or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        output, log = folder / "paper.json", folder / "output.log"
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            error: BaseException | None = None
            try:
                main(cell.arguments(folder, output), CellCLI)
            except (Exception, SystemExit) as raised:
                error = raised
        if error is not None and not output.exists():
            raise RuntimeError(f"{cell.labels}: {error}\n{log.read_text()[-2000:]}") from error
        record = json.loads(output.read_text())
    seconds = time.perf_counter() - started
    told = {name: getattr(cell, name) for name in ("labels", "seed", "configs", "settings", "meter", "key")}
    return told | record | {"wall_seconds": seconds}


def run_cells(cells: Sequence[Cell], recording: Recording, jobs: int, show: Callable[[Row], None]) -> list[Row]:
    """The rows of all cells, in their order; those that `recording` has already are not run again."""
    known = {row["key"]: row for row in recording.rows}
    missing = [cell for cell in cells if cell.key not in known or cell.keep is not None]
    with contextlib.closing(rows_of(missing, jobs)) as rows:
        for row in rows:
            if row["key"] in known:  # run again for what it leaves
                recording.rows.remove(known[row["key"]])
            known[row["key"]] = row | {"commit": commit()}
            recording.add(known[row["key"]])
            show(row)
    return [known[cell.key] for cell in cells]


def rows_of(cells: Sequence[Cell], jobs: int) -> Generator[Row]:
    """What the cells give, as they end: one by one in this process, or several at a time in as many others."""
    if jobs == 1:
        yield from map(run_cell, cells)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # inherited: one thread a worker
    # spawned: a forked worker would inherit threads and random state
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), end_with_parent)
    try:
        for future in as_completed([pool.submit(run_cell, cell) for cell in cells]):
            yield future.result()
    except BaseException:  # a failed cell, an interrupt: the others are not waited for
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """In a worker, on Linux: be killed when the parent is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@functools.cache  # as it was when the first cell began
def commit() -> str:
    """The commit that is checked out, with a + where the code or the configs differ from it."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    code = ["gvpo_lightning", "kernels", "configs", "benchmarks", ":!benchmarks/results"]
    status = [*git, "status", "--porcelain", "--untracked-files=all", "--", *code]
    changed = subprocess.run(status, capture_output=True, text=True, check=False).stdout.strip()
    return (found or "unknown") + ("+" if found and changed else "")


def config_texts(paths: Iterable[str]) -> dict[str, Any]:
    """The config files, read, by path."""
    return {path: yaml.safe_load((ROOT / path).read_text()) for path in paths}
