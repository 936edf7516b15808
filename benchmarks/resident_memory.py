"""Whether a run's memory grows with its length: resident memory over many rollouts.

    python -m benchmarks.resident_memory      # 500 rollouts: some minutes on one core

Trains the arithmetic policy with rewards in worker processes, replayed completions, a validation every 50 rollouts and
a checkpoint every 100. Prints the slope of the process's resident memory, by least squares over the second half of the
rollouts, when the replay buffer is full and all code has run, and the memory at both ends of it.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from datasets import Dataset
from torch.utils.data import DataLoader

from benchmarks.file_changes import POLICY
from gvpo_lightning import (
    GenerationSettings,
    GVPOModule,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)
from gvpo_lightning.callbacks import CompletionsTable, RunCheckpoint
from gvpo_lightning.rewards import ExactAnswer


def resident_megabytes() -> float:
    """Of this process, in millions of bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class ResidentMemory(L.Callback):
    """Notes the resident memory after every rollout."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        """One micro-batch is a rollout here."""
        self.megabytes.append(resident_megabytes())


def measure(num_rollouts: int) -> list[float]:
    """Megabytes after each rollout."""
    L.seed_everything(0, verbose=False)
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    module = GVPOModule(
        str(POLICY),
        ExactAnswer(),
        rollout=RolloutSettings(group_size=8, prompts_per_rollout=8, prompts_per_update=8),
        generation=GenerationSettings(max_new_tokens=4),
        sources=SourceSettings(policy=4, replay=ReplaySettings(count=4, capacity=200)),
        reference="previous",
    )
    memory, validation = ResidentMemory(), DataLoader(Dataset.from_list(sums[::5]), batch_size=20, collate_fn=list)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=num_rollouts,
            default_root_dir=folder,
            check_val_every_n_epoch=None,
            val_check_interval=50,
            enable_model_summary=False,
            callbacks=[memory, CompletionsTable(), RunCheckpoint(folder, every_n_train_steps=100)],
        )
        trainer.fit(module, RolloutLoader(sums, module), validation)
    return memory.megabytes


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=500)
    count = parser.parse_args().rollouts
    late = measure(count)[count // 2 :]
    slope = statistics.linear_regression(range(len(late)), late).slope
    print(
        f"{count} rollouts: {1000 * slope:.2f} kB a rollout over the last {len(late)}, from {late[0]:.1f} to "
        f"{late[-1]:.1f} MB"
    )


if __name__ == "__main__":
    main()
