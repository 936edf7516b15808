"""`gvpo fit | validate | test | predict | reference --config FILE`: Lightning's CLI around `GVPOModule`.

What wins on resume: the config and the command line, always; a checkpoint brings weights, optimizer,
scheduler and position, and no settings.
"""

import argparse
import functools
import inspect
import itertools
import operator
import sys
import typing
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gvpo_lightning.callbacks import CompletionsTable, PredictionWriter, RunCheckpoint, RunSummary
from gvpo_lightning.callbacks.whole import CheckpointError
from gvpo_lightning.data import PromptDataModule
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.reference_cache import fill_cache

SUBCOMMANDS = ("fit", "validate", "test", "predict", "reference")


def prefer_integers() -> None:
    """Let `--trainer.limit_val_batches=1` mean one batch, whatever was imported before Lightning.

    typing caches `Union`s that compare equal, so Lightning's `int | float` may come out as `float | int`, and
    the first type that fits is what jsonargparse takes: 1.0, which is all batches.
    """
    annotations = inspect.unwrap(Trainer.__init__).__annotations__
    for name, annotation in annotations.items():
        types = typing.get_args(annotation)
        if {int, float} <= set(types) and all(isinstance(t, type) for t in types):
            annotations[name] = functools.reduce(operator.or_, sorted(types, key=lambda t: t is float))


def keep_old_metrics(path: Path) -> None:
    """Rename an earlier run's file to the next free metrics.<n>.csv: CSVLogger would delete it."""
    if path.exists():
        number = next(n for n in itertools.count(1) if not path.with_suffix(f".{n}.csv").exists())
        path.rename(path.with_suffix(f".{number}.csv"))


class GVPOTrainer(Trainer):
    """Lightning's Trainer, with a function for the one subcommand that it lacks."""

    def reference(
        self, model: GVPOModule, datamodule: PromptDataModule | None = None, output: str | None = None
    ) -> None:
        """Score recorded completions under the reference, for `reference: cached`.

        Args:
            model: its `sources.file` is scored by the model that `reference.model`, or else `policy`, names.
            datamodule: not used; the prompts are the file's.
            output: a .jsonl or .parquet file; default: the recorded one is replaced.
        """
        print(f"Reference log-probs are in {fill_cache(model, self, output)}")


class GVPOCLI(LightningCLI):
    """LightningCLI with GVPO's defaults."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `reference`."""
        return LightningCLI.subcommands() | {"reference": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`completions_table.*` configures the table that every run has."""
        parser.add_lightning_class_args(CompletionsTable, "completions_table")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """CSV and TensorBoard in the run's folder, and checkpoints every epoch, unless the config says otherwise."""
        config = self._get(self.config_init, "trainer")
        folder = Path(config.get("default_root_dir") or ".")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = False
            if self.subcommand == "fit":
                keep_old_metrics(folder / "metrics.csv")
                kwargs["logger"] = [
                    CSVLogger(folder, name="", version=""),
                    TensorBoardLogger(folder, name="tensorboard", version=""),
                ]
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in config.get("callbacks") or [])
        if config.get("enable_checkpointing") is not False and not has_own:
            self.trainer_defaults["callbacks"].append(RunCheckpoint())
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning does; what fails within training is a defect to be traced, not a setting to be mended."""
        try:
            super()._run_subcommand(subcommand)
        except (ValueError, FileNotFoundError) as error:
            if self.trainer.global_step or self.model.rollout is not None:
                raise RuntimeError(f"{subcommand} failed at step {self.trainer.global_step}: {error}") from error
            raise

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let the checkpoint's settings override the command line."""


def main(args: ArgsType = None) -> None:
    """The `gvpo` command; `args` for calls from Python.

    A mistake in the settings or the data ends it with one line on stderr and exit status 2, a checkpoint that can't
    be written with one line and status 1, SIGTERM with status 143 (`callbacks.Preemption`).
    """
    prefer_integers()
    try:
        GVPOCLI(
            GVPOModule,
            PromptDataModule,
            trainer_class=GVPOTrainer,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [RunSummary(), PredictionWriter()]},
            # without the pages of usage that jsonargparse prints in front of its own errors
            parser_kwargs={"exit_on_error": False} | {name: {"exit_on_error": False} for name in SUBCOMMANDS},
        )
    except (ValueError, FileNotFoundError, argparse.ArgumentError, MisconfigurationException, CheckpointError) as error:
        message = " ".join([str(error), *getattr(error, "__notes__", ())])
        print(f"gvpo: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, CheckpointError) else 2) from error


if __name__ == "__main__":
    main()
