"""`BenchmarkReport`: what `gvpo test` writes of `data.benchmarks`."""

import itertools
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.evaluation.benchmarks import ProblemSet
from gvpo_lightning.evaluation.grading import Extractor, answer_extractor, grader, reward_facts
from gvpo_lightning.evaluation.loader import ProblemBatch
from gvpo_lightning.evaluation.records import Record, append_records, by_problem, completion_records, write_records
from gvpo_lightning.evaluation.report import Run, average, write_report, write_run
from gvpo_lightning.evaluation.scores import BenchmarkScores, summarise
from gvpo_lightning.module import GVPOModule

PACKAGES = ("gvpo-lightning", "torch", "transformers", "lightning", "math-verify")


class BenchmarkReport(L.Callback):
    """Saves every completion of a benchmark as batches finish, and at the end scores, a table and a plot.

    They are in `evaluation/` in the run's folder; one that an earlier test has left is renamed. Completions are in
    `<benchmark>.jsonl`, and until the end those of further ranks in `<benchmark>.rank<n>.jsonl`. Other tests, without
    benchmarks, are left alone.
    """

    def __init__(self) -> None:
        self._scores: dict[str, BenchmarkScores] = {}
        self._records: dict[str, list[Record]] = {}
        self._extract: Extractor | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the reward before the model is loaded."""
        if stage == "test" and benchmark_sets(trainer):
            assert isinstance(pl_module, GVPOModule)
            grader(pl_module.rewards)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for the results."""
        assert isinstance(pl_module, GVPOModule)
        ranks = pl_module.data_ranks
        # torchmetrics would take ranks that hold one model for ranks with different problems
        synced = {"sync_on_compute": ranks.size > 1, "process_group": ranks.process_group}
        sets = benchmark_sets(trainer)
        self._scores, self._records = {}, {s.name: [] for s in sets}
        if not sets:
            return
        _, reward = grader(pl_module.rewards)
        self._extract = answer_extractor(reward)
        for problems in sets:
            num_samples = problems.num_samples or pl_module.group_size
            self._scores[problems.name] = BenchmarkScores(num_samples, self._extract is not None, **synced)
        if trainer.is_global_zero:
            keep_old_results(self._folder(trainer))
            self._folder(trainer).mkdir(parents=True)
            # what completions of a test that ends early are regraded by
            write_run(self._folder(trainer), description(trainer, pl_module))
        trainer.strategy.barrier()

    @staticmethod
    def _folder(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "evaluation"

    def _path(self, trainer: L.Trainer, benchmark: str) -> Path:
        rank = "" if trainer.is_global_zero else f".rank{trainer.global_rank}"
        return self._folder(trainer) / f"{benchmark}{rank}.jsonl"

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Save and count one batch."""
        if not isinstance(batch, ProblemBatch) or batch.name not in self._scores:
            return
        assert isinstance(pl_module, GVPOModule)
        records = completion_records(batch, outputs["rollout"], self._extract)
        self._records[batch.name] += records
        for samples in by_problem(records).values():
            self._scores[batch.name].update(samples)
        if pl_module.data_ranks.is_first_of_model:  # the others have the same
            append_records(self._path(trainer, batch.name), records)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the ranks' completions together and write the report."""
        if not self._scores:
            return
        assert isinstance(pl_module, GVPOModule)
        summaries: dict[str, Any] = {}
        all_problems = problem_counts(trainer)
        for name, scores in self._scores.items():
            if pl_module.data_ranks.process_group is not None or pl_module.data_ranks.size > 1:
                for metric in scores.metrics.values():
                    metric.to(pl_module.device)  # where the ranks' collectives work
            values = scores.compute()
            records = [record for part in pl_module.data_ranks.gather(self._records[name]) for record in part]
            if not records:  # limit_test_batches
                continue
            summaries[name] = summarise(records, scores, values, all_problems[name])
            pl_module.log_dict({f"test/{name}/{metric}": value["value"] for metric, value in values.items()})
            if trainer.is_global_zero:
                write_records(self._path(trainer, name), records)
        trainer.strategy.barrier()
        for name in () if trainer.is_global_zero else summaries:
            self._path(trainer, name).unlink(missing_ok=True)
        if trainer.is_global_zero and summaries:
            run = description(trainer, pl_module)
            run = {"name": run.pop("name"), "benchmarks": summaries, "average": average(summaries, all_problems)} | run
            write_run(self._folder(trainer), run)
            write_report(self._folder(trainer), [run])
            rank_zero_info((self._folder(trainer) / "evaluation.md").read_text() + f"\nin {self._folder(trainer)}")


def benchmark_sets(trainer: L.Trainer) -> list[ProblemSet]:
    """The benchmarks of this test, if it has any."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule.problem_sets if isinstance(datamodule, PromptDataModule) else []


def problem_counts(trainer: L.Trainer) -> dict[str, int]:
    """How many problems each benchmark has."""
    return {problems.name: len(problems.rows) for problems in benchmark_sets(trainer)}


def keep_old_results(folder: Path) -> None:
    """Rename an earlier test's folder to the next free evaluation.<n>."""
    if folder.exists():
        number = next(n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


def description(trainer: L.Trainer, module: GVPOModule) -> Run:
    """What of a run is known before it begins; its name is the policy's, with the checkpoint if there is one."""
    name = policy_name(module) if trainer.ckpt_path is None else f"{policy_name(module)}, {trainer.ckpt_path}"
    versions = {package: version(package) for package in PACKAGES}
    return {"name": name, "settings": settings(trainer, module), "versions": versions}


def policy_name(module: GVPOModule) -> str:
    """The policy's folder or hub id, or what its config calls it."""
    source = module.policy_source
    return source if isinstance(source, str) else (source.config.name_or_path or type(source).__name__)


def settings(trainer: L.Trainer, module: GVPOModule) -> dict[str, Any]:
    """What the scores depend on."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    assert module.rewards is not None
    return {
        "policy": policy_name(module),
        "ckpt_path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
        "seed": module.seed,
        "generation": asdict(module.generation),
        "prompt_template": datamodule.prompt_template,
        "conversational": datamodule.conversational,
        "system_prompt": datamodule.system_prompt,
        "batch_size": datamodule.batch_size,
        "benchmarks": {name: asdict(benchmark) for name, benchmark in datamodule.benchmarks.items()},
        "problems": problem_counts(trainer),
        "precision": str(trainer.precision),
        "world_size": trainer.world_size,
    } | reward_facts(module.rewards)
