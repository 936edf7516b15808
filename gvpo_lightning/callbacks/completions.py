"""Completions for people to read, while training and from `predict`."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards.values import json_line
from gvpo_lightning.rollout.rollout import Rollout

COLUMNS = ("group", "prompt", "completion", "source", "reward")


class CompletionsTable(L.Callback):
    """Every n optimizer steps, shows completions of the current rollout on screen and logs them.

    Args:
        every_n_steps: optimizer steps between two tables; 0 = none.
        num_completions: rows shown. All rows shown are also appended to `completions.jsonl` in the run's
            folder, and are text in TensorBoard.
    """

    def __init__(self, every_n_steps: int = 50, num_completions: int = 8) -> None:
        self.every_n_steps = every_n_steps
        self.num_completions = num_completions
        self._last_step = 0

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A new run starts a new file, a resumed one goes on with it."""
        self._last_step = 0
        self._file = Path(trainer.default_root_dir) / "completions.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if trainer.global_step == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._file.unlink(missing_ok=True)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the table if it is due."""
        step = trainer.global_step
        due = self.every_n_steps and step != self._last_step and step % self.every_n_steps == 0
        if not due or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._last_step = step
        assert isinstance(pl_module, GVPOModule)
        assert pl_module.rollout is not None
        rows = table_rows(pl_module.rollout, self.num_completions)
        title = f"completions at step {step}"
        Console().print(render_table(rows, title))
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json_line({"step": step} | row) for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("completions", markdown_table(rows), step)


def table_rows(rollout: Rollout, num_completions: int) -> list[dict[str, Any]]:
    """The first completions of a rollout as dicts with the keys of `COLUMNS`; prompts as text.

    Of several rewards, each one's own follows as `reward/<name>`.
    """
    groups, rewards = rollout.batch.group_ids.tolist(), rollout.batch.rewards.tolist()
    components = rollout.component_columns()
    rows = []
    for row, completion in enumerate(rollout.completions[:num_completions]):
        prompt = rollout.prompts[groups[row]]
        text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))
        reward = None if rewards[row] != rewards[row] else rewards[row]
        cells = (groups[row], text, completion, rollout.sources[row], reward)
        own = {name: values[row] for name, values in components.items()}
        rows.append(dict(zip(COLUMNS, cells, strict=True)) | own)
    return rows


def render_table(rows: list[dict[str, Any]], title: str) -> Table:
    """For the screen, text as it is (no markup, no emoji codes) but cut; a group's prompt is shown once."""
    table = Table(*(rows[0] if rows else COLUMNS), title=title)
    shown = None
    for row in rows:
        first = row["group"] != shown
        shown = row["group"]
        cells = {name: Text(str(value)[:200]) for name, value in row.items()}
        if not first:
            cells["prompt"] = Text()
        table.add_row(*cells.values())
    return table


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """For TensorBoard."""
    columns = list(rows[0]) if rows else COLUMNS
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = (str(row[column]).replace("|", "\\|").replace("\n", " ") for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict` samples as JSON lines in the offline format (`gvpo_lightning.sources.offline`).

    The file is `predictions.jsonl` in the run's folder, one more per rank from the second rank on; it is
    written batch by batch, so what was sampled before a failure is kept. What JSON does not have, such as dates, bytes
    and decimals, is written as text.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="batch")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start with an empty file."""
        assert isinstance(pl_module, GVPOModule)
        rank = "" if trainer.global_rank == 0 else f".rank{trainer.global_rank}"
        self._path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        if pl_module.placement.ranks.is_first_of_model:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("")

    def write_on_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *args: Any) -> None:
        """Append one batch."""
        assert isinstance(pl_module, GVPOModule)
        if not pl_module.placement.ranks.is_first_of_model:  # which has the same
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(map(json_line, prediction))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say where they are."""
        print(f"Predictions are in {self._path}")
