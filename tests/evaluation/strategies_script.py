"""Tests a tiny policy on five sums under one strategy, in as many processes as it takes. Run by test_strategies."""

import json
from pathlib import Path

import lightning as L

from gvpo_lightning import RolloutSettings
from gvpo_lightning.callbacks import BenchmarkReport
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.evaluation.benchmarks import Benchmark
from gvpo_lightning.rewards import ExactAnswer
from tests.distributed.train_script import make_module, make_trainer

SUMS = [{"prompt": f"{n}+{n % 7}=", "problem": f"{n}+{n % 7}=", "answer": str(n % 2)} for n in range(5)]


def main(model: str, folder: Path, name: str) -> None:
    """Leaves `evaluation/` in the folder."""
    L.seed_everything(0, verbose=False)
    data = folder / "sums.jsonl"
    suite = Benchmark(str(data), split="train", num_samples=3, count=5)
    module = make_module(model, "full", reward=ExactAnswer(compare="last_number"), rollout=RolloutSettings())
    trainer = make_trainer(name, folder, callbacks=[BenchmarkReport()])
    datamodule = PromptDataModule(benchmarks={"sums": suite, "more": suite}, batch_size=1)
    (logged,) = trainer.test(module, datamodule, verbose=False)
    (folder / f"logged{trainer.global_rank}.json").write_text(json.dumps(logged))
