"""Benchmarks that are tested again by the same trainer and datamodule."""

import json

import lightning as L

from gvpo_lightning import PromptDataModule
from gvpo_lightning.callbacks import BenchmarkReport
from gvpo_lightning.evaluation.benchmarks import Benchmark
from gvpo_lightning.rewards import ExactAnswer


def test_a_second_test_measures_every_problem_once(make_module, tmp_path):
    rows = [{"problem": f"{n}+1=", "answer": str(n + 1)} for n in range(3)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    suite = Benchmark(str(tmp_path / "sums.jsonl"), split="train", num_samples=2)
    datamodule = PromptDataModule(benchmarks={"sums": suite})
    module = make_module(reward=ExactAnswer())
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[BenchmarkReport()],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    for _ in range(2):
        trainer.test(module, datamodule=datamodule, verbose=False)
        assert len((tmp_path / "evaluation" / "sums.jsonl").read_text().splitlines()) == 6
    assert (tmp_path / "evaluation.1").is_dir()
