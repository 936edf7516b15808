"""The GVPO paper's tables and figures at a size of minutes, each by one command.

    python -m benchmarks.paper table1        # writes benchmarks/results/paper/table1.{json,md,png}
    python -m benchmarks.paper all           # one after another
    python -m benchmarks.paper page          # tables, figures and docs/results.md from what has been measured
    python -m benchmarks.paper beta --updates 200 --output outputs/paper \\
        --config configs/bases/gpu.yaml configs/bases/gsm8k.yaml configs/qwen2.5_0.5b_gsm8k.yaml

Two processes by default, and less than 20 minutes an experiment on two CPU cores with the shipped tasks. With --config
the runs are those of a `gvpo fit` config, or of several laid over each other, which experiments vary: its objective and
sources give way, and so does its beta, which is meant for rewards from 0 to 1. table1 and stability, which try several
learning rates, then need --learning-rates. What is asked for by options does not land among the published results.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.paper.cells import ROOT
from benchmarks.paper.experiment import PAGE_RESULTS, conclude_again, perform
from benchmarks.paper.options import Options
from benchmarks.paper.page import EXPERIMENTS, write_page

TRIALS = Path("outputs/paper")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*EXPERIMENTS, "all", "page"])
    parser.add_argument(
        "--config", nargs="+", help="of a `gvpo fit` run, in layers, instead of the shipped tasks (see above)"
    )
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--updates", type=int, help="optimizer updates of a run")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the grid of table1 and stability")
    parser.add_argument("--jobs", type=int, help="runs at a time; default 2, with --config 1")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON has already")
    parser.add_argument("--output", type=Path, help=f"folder; default {PAGE_RESULTS}, with options {TRIALS}")
    asked = parser.parse_args(arguments)
    chosen = (asked.config, asked.seeds, asked.updates, asked.learning_rates)
    if asked.output is None:
        asked.output = PAGE_RESULTS if chosen == (None,) * len(chosen) else TRIALS
    asked.output = asked.output.resolve()
    if asked.jobs is not None and asked.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {asked.jobs}.")
    if asked.config and not asked.learning_rates and asked.name in ("all", "table1", "stability"):
        parser.error("--config needs --learning-rates here, for example 3e-7 1e-6 3e-6: ours fit tiny policies only.")
    if asked.name == "page":
        for experiment in EXPERIMENTS.values():
            conclude_again(experiment, asked.output / experiment.name)
        write_page(asked.output)
        return
    configs = None if asked.config is None else tuple(str(Path(path).resolve()) for path in asked.config)
    if configs is None:
        os.chdir(ROOT)  # the tasks' paths are below it
        torch.set_num_threads(1)  # of tiny tensors
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers end too
    asked.output.mkdir(parents=True, exist_ok=True)
    for name in EXPERIMENTS if asked.name == "all" else [asked.name]:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            options = Options(
                Path(folder),
                configs,
                None if asked.seeds is None else tuple(asked.seeds),
                asked.updates,
                None if asked.learning_rates is None else tuple(asked.learning_rates),
            )
            jobs = asked.jobs or (1 if configs else 2)
            rows = perform(EXPERIMENTS[name], options, asked.output / name, jobs, asked.resume)
        print(f"{(asked.output / name).with_suffix('.md').read_text()}")
        print(f"{name}: {len(rows)} runs in {(time.perf_counter() - started) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
