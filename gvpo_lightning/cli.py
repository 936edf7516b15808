"""`gvpo fit | validate | test | predict | reference | export | debug-batch --config FILE`: Lightning's CLI.

And `gvpo regrade FOLDER`, which needs neither trainer nor model (`gvpo_lightning.commands.regrade`).

What wins on resume: the config and the command line, always; a checkpoint brings weights, optimizer,
scheduler and position, and no settings.
"""

import argparse
import functools
import inspect
import operator
import os
import sys
import typing
from argparse import ArgumentError
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gvpo_lightning.atomic import keep_old
from gvpo_lightning.callbacks import (
    BenchmarkReport,
    CompletionsTable,
    MemoryEstimate,
    PredictionWriter,
    RunCheckpoint,
    RunSummary,
)
from gvpo_lightning.checkpointing.resumption import saying_how_to_resume
from gvpo_lightning.checkpointing.save import CheckpointError
from gvpo_lightning.checkpointing.whole import newest_last
from gvpo_lightning.checks.trainer import check_devices
from gvpo_lightning.commands import regrade
from gvpo_lightning.commands.debug_batch import debug_batch
from gvpo_lightning.commands.reference import fill_cache
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.export.folder import export_checkpoint
from gvpo_lightning.module import GVPOModule

MODEL_ALONE = ("export", "debug-batch")  # of a config with trainer and data these use the model's part
NOT_THE_MODEL = ("trainer", "data", "completions_table", "run_summary")


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


def last_checkpoint(settings: Mapping[str, Any]) -> Path:
    """The newest last.ckpt of a run with these settings of the trainer, as `fit --ckpt_path last` finds it.

    Raises:
        FileNotFoundError: there is none, or it is not whole.
    """
    folders = [Path(settings.get("default_root_dir") or ".").expanduser() / "checkpoints"]
    for callback in settings.get("callbacks") or []:
        own = {} if isinstance(callback, str) else callback.get("init_args") or {}
        folders += [Path(own["dirpath"]).expanduser()] if own.get("dirpath") else []
    newest = newest_last(path for folder in folders for path in folder.glob("last*.ckpt"))
    if newest is None:
        raise FileNotFoundError(
            f"ckpt_path=last: there is no last.ckpt in {' or '.join(map(str, folders))}: give the checkpoint's path."
        )
    return newest


class GVPOTrainer(Trainer):
    """Lightning's Trainer, with functions for the subcommands that it lacks."""

    def reference(
        self, model: GVPOModule, datamodule: PromptDataModule | None = None, output: str | None = None
    ) -> None:
        """Score recorded completions under the reference, for `reference: cached`.

        Args:
            model: its `sources.file` is scored by the model that `reference.model`, or else `policy`, names.
            datamodule: not used; the prompts are the file's.
            output: a .jsonl or .parquet file; default: the recorded one is replaced.
        """
        file, reference = model.sources.settings.file, model.reference_settings.model
        size = model.rollout_settings.micro_batch_size or model.generation.batch_size
        target = fill_cache(file, model.source, reference, model.scoring, size, self.strategy, output)
        print(f"Reference log-probs are in {target}")

    def export(
        self,
        model: GVPOModule,
        ckpt_path: str,
        output: str,
        max_shard_size: str = "5GB",
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        merge: bool = False,
    ) -> None:
        """Turn a checkpoint, sharded or not, into a Hugging Face folder.

        Args:
            model: its policy's config and tokenizer are the exported model's.
            ckpt_path: a checkpoint file, the folder of a distributed one, or "last".
            output: the new folder.
            max_shard_size: the most that one file of weights holds, and that is in memory at a time.
            dtype: of the weights; default: the checkpoint's, or of a merged model model.loading.dtype.
            merge: of a policy with an adapter, the whole model with the adapter merged in, instead of it alone.
        """
        as_torch = None if dtype is None else getattr(torch, dtype)
        folder = export_checkpoint(
            *(model.source, model.settings, ckpt_path, output),
            max_shard_size=max_shard_size,
            dtype=as_torch,
            merge_adapter=merge,
        )
        print(f"The policy is in {folder}")

    def debug_batch(self, model: GVPOModule, batch: str, ckpt_path: str | None = None) -> None:
        """Show what is to blame in the update that a run stopped at.

        Args:
            model: its policy computes the update again.
            batch: the file that the stopped run names.
            ckpt_path: weights for the policy: a checkpoint file, the folder of a distributed one, or "last".
        """
        debug_batch(model.source, model.objective, model.scoring, batch, ckpt_path)


# commands are spelt with hyphens, and looked up by that name
setattr(GVPOTrainer, "debug-batch", GVPOTrainer.debug_batch)


class GVPOCLI(LightningCLI):
    """LightningCLI with GVPO's defaults."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `GVPOTrainer`'s."""
        return LightningCLI.subcommands() | {"reference": {"model", "datamodule"}} | {n: {"model"} for n in MODEL_ALONE}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self._model_alone = subcommand in MODEL_ALONE
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where the model's part is enough, the others are read and not used: data, GPUs or loggers need not exist."""
        if not self._model_alone:
            return super().add_core_arguments_to_parser(parser)
        parser.add_lightning_class_args(self._model_class, "model")
        for name in NOT_THE_MODEL:
            parser.add_argument(f"--{name}", type=dict[str, Any], default={}, help=argparse.SUPPRESS)
        parser.add_argument("--weights_only", type=Any, help=argparse.SUPPRESS)  # in the config.yaml that fit leaves

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`completions_table.*` and `run_summary.*` configure the table and the summary that every run has."""
        if not self._model_alone:
            parser.add_lightning_class_args(CompletionsTable, "completions_table")
            parser.add_lightning_class_args(RunSummary, "run_summary")

    def instantiate_classes(self) -> None:
        """As Lightning does, or the model alone; `--ckpt_path last` needs the trainer's settings, not a trainer."""
        if self.subcommand not in MODEL_ALONE:
            return super().instantiate_classes()
        config = self.config[self.subcommand]
        if config["ckpt_path"] == "last":
            config["ckpt_path"] = str(last_checkpoint(config["trainer"]))
        for name in NOT_THE_MODEL:
            config[name] = {}  # or jsonargparse would instantiate what has a class_path in it
        super().instantiate_classes()
        self.datamodule = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """CSV and TensorBoard in the run's folder, and checkpoints every epoch, unless the config says otherwise."""
        if self.subcommand in MODEL_ALONE:
            return self.trainer_class(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        config = self._get(self.config_init, "trainer")
        folder = Path(config.get("default_root_dir") or ".")
        if config.get("logger") in (None, True) and not config.get("fast_dev_run"):
            kwargs["logger"] = False
            if self.subcommand == "fit":
                keep_old(folder / "metrics.csv")
                kwargs["logger"] = [
                    CSVLogger(folder, name="", version=""),
                    TensorBoardLogger(folder, name="tensorboard", version=""),
                ]
        has_own = any(isinstance(callback, ModelCheckpoint) for callback in config.get("callbacks") or [])
        if config.get("enable_checkpointing") is not False and not has_own:
            self.trainer_defaults["callbacks"].append(RunCheckpoint())
        trainer = super().instantiate_trainer(**kwargs)
        check_devices(trainer.strategy, trainer.world_size)
        return trainer

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


def main(args: ArgsType = None, cli: type[GVPOCLI] = GVPOCLI) -> None:
    """The `gvpo` command; `args` for calls from Python, `cli` for one that does more or less.

    A mistake in the settings or the data ends it with one line on stderr and exit status 2, a checkpoint that can't
    be written with one line and status 1, SIGTERM with status 143 (`callbacks.Preemption`). Whatever stops a run within
    training, the last line on stderr is the command that resumes it.
    """
    prefer_integers()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a reward in a file beside the config; installed packages go first
    words = sys.argv[1:] if args is None else args
    with saying_how_to_resume(["gvpo", *words]) if isinstance(words, list) else nullcontext():
        try:
            if isinstance(words, list) and words[:1] == ["regrade"]:
                return regrade.main(words[1:])
            cli(
                GVPOModule,
                PromptDataModule,
                trainer_class=GVPOTrainer,
                args=args,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={"callbacks": [MemoryEstimate(), PredictionWriter(), BenchmarkReport()]},
                # without the pages of usage that jsonargparse prints in front of its own errors
                parser_kwargs={"exit_on_error": False, "description": "And `gvpo regrade`, with a --help of its own."}
                | {name: {"exit_on_error": False} for name in cli.subcommands()},
            )
        except (ValueError, FileNotFoundError, ArgumentError, MisconfigurationException, CheckpointError) as error:
            message = " ".join([str(error), *getattr(error, "__notes__", ())])
            print(f"gvpo: error: {' '.join(message.split())}", file=sys.stderr)
            raise SystemExit(1 if isinstance(error, CheckpointError) else 2) from error


if __name__ == "__main__":
    main()
