"""`BenchmarkReport`: what `gvpo test` writes of `data.benchmarks`."""

from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from gvpo_lightning.atomic import keep_old
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.evaluation.benchmarks import ProblemBatch, ProblemSet
from gvpo_lightning.evaluation.report import Run, average, write_report, write_run
from gvpo_lightning.evaluation.scores import (
    BenchmarkScores,
    Extractor,
    Record,
    answer_extractor,
    append_records,
    by_problem,
    completion_records,
    grader,
    reward_facts,
    summarise,
    write_records,
)
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
        self._run: Run = {}  # what of it is known before it begins

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check the reward before the model is loaded."""
        if stage == "test" and benchmark_sets(trainer.datamodule):  # type: ignore[attr-defined]
            assert isinstance(pl_module, GVPOModule)
            grader(pl_module.rewards)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make room for the results."""
        assert isinstance(pl_module, GVPOModule)
        ranks, rewards = pl_module.placement.ranks, pl_module.rewards
        # torchmetrics would take ranks that hold one model for ranks with different problems
        synced = {"sync_on_compute": ranks.size > 1, "process_group": ranks.process_group}
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        sets = benchmark_sets(datamodule)
        self._scores, self._records = {}, {s.name: [] for s in sets}
        if not sets:
            return
        _, reward = grader(rewards)
        assert rewards is not None
        self._extract = answer_extractor(reward)
        for problems in sets:
            num_samples = problems.num_samples or pl_module.group_size
            self._scores[problems.name] = BenchmarkScores(num_samples, self._extract is not None, **synced)
        settings = {
            "policy": pl_module.source.name,
            "ckpt_path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "seed": pl_module.seed,
            "generation": asdict(pl_module.generation),
            **prompt_facts(datamodule),
            "precision": str(trainer.precision),
            "world_size": trainer.world_size,
            **reward_facts(rewards),
        }
        self._run = description(pl_module.source.name, settings)
        self._folder = Path(trainer.default_root_dir) / "evaluation"
        self._rank = "" if trainer.is_global_zero else f".rank{trainer.global_rank}"
        if trainer.is_global_zero:
            keep_old(self._folder)
            self._folder.mkdir(parents=True)
            write_run(self._folder, self._run)  # what completions of a test that ends early are regraded by
        trainer.strategy.barrier()

    def _path(self, benchmark: str) -> Path:
        return self._folder / f"{benchmark}{self._rank}.jsonl"

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Save and count one batch."""
        if not isinstance(batch, ProblemBatch) or batch.name not in self._scores:
            return
        assert isinstance(pl_module, GVPOModule)
        records = completion_records(batch, outputs["rollout"])
        extract = self._extract
        try:
            if extract is not None:
                for record in records:
                    record["answer"] = extract(record["completion"])
        finally:  # what was sampled is there, whatever fails
            if pl_module.placement.ranks.is_first_of_model:  # the others have the same
                append_records(self._path(batch.name), records)
        self._records[batch.name] += records
        for samples in by_problem(records).values():
            self._scores[batch.name].update(samples)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the ranks' completions together and write the report."""
        if not self._scores:
            return
        assert isinstance(pl_module, GVPOModule)
        ranks, summaries = pl_module.placement.ranks, dict[str, Any]()
        all_problems = self._run["settings"]["problems"]
        for name, scores in self._scores.items():
            if ranks.process_group is not None or ranks.size > 1:
                for metric in scores.metrics.values():
                    metric.to(pl_module.device)  # where the ranks' collectives work
            values = scores.compute()
            records = [record for part in ranks.gather(self._records[name]) for record in part]
            if not records:  # limit_test_batches
                continue
            summaries[name] = summarise(records, scores, values, all_problems[name])
            pl_module.log_dict({f"test/{name}/{metric}": value["value"] for metric, value in values.items()})
            if trainer.is_global_zero:
                write_records(self._path(name), records)
        trainer.strategy.barrier()
        for name in () if trainer.is_global_zero else summaries:
            self._path(name).unlink(missing_ok=True)
        if trainer.is_global_zero and summaries:
            results = {"benchmarks": summaries, "average": average(summaries, all_problems)}
            run = {"name": self._run["name"]} | results | self._run
            write_run(self._folder, run)
            write_report(self._folder, [run])
            rank_zero_info((self._folder / "evaluation.md").read_text() + f"\nin {self._folder}")


def benchmark_sets(datamodule: Any) -> list[ProblemSet]:
    """The benchmarks of a test with this data, if it has any."""
    return datamodule.problem_sets if isinstance(datamodule, PromptDataModule) else []


def prompt_facts(datamodule: PromptDataModule) -> dict[str, Any]:
    """What scores depend on of the problems and how they are put."""
    return {
        "prompt_template": datamodule.prompt_template,
        "conversational": datamodule.conversational,
        "system_prompt": datamodule.system_prompt,
        "batch_size": datamodule.batch_size,
        "benchmarks": {name: asdict(benchmark) for name, benchmark in datamodule.benchmarks.items()},
        "problems": {problems.name: len(problems.rows) for problems in datamodule.problem_sets},
    }


def description(policy: str, settings: dict[str, Any]) -> Run:
    """What of a run is known before it begins; its name is the policy's, with the checkpoint if there is one."""
    name = policy if settings["ckpt_path"] is None else f"{policy}, {settings['ckpt_path']}"
    return {"name": name, "settings": settings, "versions": {package: version(package) for package in PACKAGES}}
