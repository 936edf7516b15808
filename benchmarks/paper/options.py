"""What a run of an experiment is asked for, and the cells that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.cells import Cell

TASKS = {name: (f"benchmarks/paper/tasks/{name}.yaml",) for name in ("sums", "sums_small", "countdown", "chains")}
ANSWERS = {"sums": "answer", "sums_small": "answer", "countdown": "answers"}  # columns with all that is right
CONSTANT = {"model.lr_scheduler": None}  # settings of a learning rate that does not fall, which would hide divergence
# `gvpo fit` settings; each method's strength of the pull to the reference is its own paper's
METHODS: dict[str, dict[str, Any]] = {
    "SFT": {"model.objective": "sft", "model.beta": 0.1},
    "DPO": {"model.objective": "dpo", "model.beta": 0.1},
    "PG + KL": {"model.objective": "policy_gradient", "model.beta": 0.1},
    "GRPO": {"model.objective": "grpo", "model.beta": 0.04},
    "Dr.GRPO": {"model.objective": "dr_grpo", "model.beta": 0.0},
    "GVPO": {"model.beta": 0.1},
}


# what experiments say of a config's objective and sources where they say nothing: GVPO on fresh completions
FRESH_GVPO: dict[str, Any] = {
    "model.objective": "gvpo",
    "model.sources": {"policy": None, "replay": None, "demonstrations": None, "file": None},
}


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        configs: of a run to take instead of the shipped tasks; its own learning rate, schedule and number of updates
            hold where the other options do not say otherwise.
        seeds: None = the experiment's own.
        updates: None = the experiment's own, or with `configs` theirs.
        learning_rates: the grid; None = the experiment's own. Needed with `configs` where there is a grid.
        folder: for policies that cells leave for later cells.
    """

    folder: Path
    configs: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    updates: int | None = None
    learning_rates: tuple[float, ...] | None = None

    def tasks(self, *names: str) -> dict[str, tuple[str, ...]]:
        """Config files of the shipped tasks of these names, or of the one run that was given instead."""
        return {"config": self.configs} if self.configs else {name: TASKS[name] for name in names}

    def grid(self, own: Sequence[float]) -> tuple[float, ...]:
        """The learning rates to try.

        Raises:
            ValueError: none are known for a run that was given.
        """
        if self.learning_rates is None and self.configs:
            raise ValueError(
                "--config needs --learning-rates here: the grid of the shipped tasks fits tiny policies only. "
                "For example --learning-rates 3e-7 1e-6 3e-6."
            )
        return tuple(own) if self.learning_rates is None else self.learning_rates

    def cell(
        self,
        configs: tuple[str, ...],
        labels: dict[str, Any],
        settings: dict[str, Any],
        seed: int,
        *,
        updates: int,
        learning_rate: float | None,
        meter: dict[str, Any] | None = None,
        keep: str | None = None,
    ) -> Cell:
        """A cell of `updates` optimizer updates, unless the command line or its config decides.

        Args:
            learning_rate: falls linearly to nearly 0, unless `settings` have a schedule; None leaves the config's.
        """
        if self.configs:
            sources = FRESH_GVPO["model.sources"] | settings.get("model.sources", {})
            settings = FRESH_GVPO | settings | {"model.sources": sources}
        number = self.updates or (None if self.configs else updates)
        if number is not None:
            settings = {"trainer.max_steps": number, "trainer.max_epochs": -1} | settings
        if number is not None and not self.configs:
            settings = {"model.lr_scheduler": linear_to_zero(number)} | settings
        if learning_rate is not None:
            settings = settings | {"model.optimizer.init_args.lr": learning_rate}
        column = next((column for task, column in ANSWERS.items() if configs == TASKS[task]), None)
        return Cell(labels, configs, settings, seed, {"answers": column} | (meter or {}), keep)


def linear_to_zero(updates: int) -> dict[str, Any]:
    """The schedule of the shipped tasks."""
    arguments = {"start_factor": 1.0, "end_factor": 0.02, "total_iters": updates}
    return {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": arguments}
