"""The GVPO paper's tables and figures at a size of minutes, each by one command.

    python -m benchmarks.paper table1        # writes benchmarks/results/paper/table1.{json,md,png}
    python -m benchmarks.paper all           # one after another
    python -m benchmarks.paper page          # docs/results.md from what has been measured
    python -m benchmarks.paper beta --config configs/qwen2.5_0.5b_gsm8k.yaml --updates 200 --jobs 1

Two processes by default, and less than 20 minutes an experiment on two CPU cores with the shipped tasks. With --config
the runs are those of a `gvpo fit` config, which experiments vary; experiments that tune or vary the learning rate then
need --learning-rates.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.paper.cells import ROOT
from benchmarks.paper.experiment import PAGE_RESULTS, perform
from benchmarks.paper.options import Options
from benchmarks.paper.page import EXPERIMENTS, write_page


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*EXPERIMENTS, "all", "page"])
    parser.add_argument("--config", nargs="+", help="of a `gvpo fit` run, instead of the shipped tasks")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--updates", type=int, help="optimizer updates of a run")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="the grid, where there is one")
    parser.add_argument("--jobs", type=int, help="runs at a time; default 2, with --config 1")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the JSON has already")
    parser.add_argument("--output", type=Path, default=PAGE_RESULTS, help="folder")
    asked = parser.parse_args(arguments)
    if asked.name == "page":
        write_page(asked.output)
        return
    configs = None if asked.config is None else tuple(str(Path(path).resolve()) for path in asked.config)
    if configs is None:
        os.chdir(ROOT)  # the tasks' paths are below it
    torch.set_num_threads(1)
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
