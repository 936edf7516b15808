"""Time, memory and error of the fused loss against eager torch, other libraries and a matmul floor; CPU or GPU.

    python -m benchmarks.loss                          # a GPU if there is one, else the CPU
    python -m benchmarks.loss --quick                  # under a minute on a CPU
    python -m benchmarks.loss --sweep tokens vocabulary groups head
    python -m benchmarks.loss --table                  # the JSON files -> the table in kernels/README.md, and plots

Needs torch and gvpo_kernels alone (from a source checkout: PYTHONPATH=kernels:.); the other libraries are the extra
`bench`. Providers run interleaved, in another order every round; the table holds medians. `total / floor` divides by
matmuls alone: 6NHV, or 2NHV forward only, timed in the same rounds. A provider whose error against float64, on a
slice of the problem, is above twice eager's (compaction: plus what it may leave out) shows no speed. Rows are written
as they come, eager's last.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.loss_measure import Settings, measure
from benchmarks.loss_problem import Shape
from benchmarks.loss_providers import Provider, providers
from benchmarks.recording import RESULTS, Recording
from benchmarks.report import plot, table, update_readme

SWEEPS = ("tokens", "vocabulary", "groups", "head")
IN_SWEEPS = {("ours", "recompute"), ("ours", "stash"), ("TRL", "GVPO"), ("eager", "all logits")}


def sweep_shapes(name: str, shape: Shape) -> list[Shape]:
    """The shapes of a sweep around one."""
    if name == "tokens":
        factors = (1 / 16, 1 / 4, 1, 2, 4, 8) if shape.tokens >= 16_384 else (1 / 4, 1 / 2, 1, 2)
        return [replace(shape, tokens=int(shape.tokens * factor)) for factor in factors]
    if name == "vocabulary":
        sizes = (32_768, 65_536, 131_072, 262_144) if shape.vocabulary > 32_768 else (4_096, 16_384, 65_536)
        return [replace(shape, vocabulary=size) for size in sizes]
    if name == "groups":
        return [replace(shape, completions=64, group_size=size) for size in (2, 8, 64)]
    return [replace(shape, tied=tied) for tied in (False, True)]


def in_sweep(provider: Provider) -> bool:
    """Whether a provider takes part in sweeps."""
    return (provider.name, provider.mode) in IN_SWEEPS and provider.implementation != "torch.compile"


def parse() -> argparse.Namespace:
    """The command line; what is left out follows the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds")
    parser.add_argument(
        "--sweep", nargs="+", choices=SWEEPS, default=[], help="further shapes, fewer providers, half the rounds"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing; table and plots from the JSON")
    parser.add_argument("--dtype")
    parser.add_argument("--output", type=Path)
    for name in ("--tokens", "--hidden", "--vocabulary", "--rounds", "--warm-up"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    defaults = (16_384, 3_584, 152_064, "bfloat16", 10, 3) if cuda else (1_024, 512, 32_000, "float32", 3, 1)
    if arguments.quick:
        defaults = (4_096, 1_024, 32_768, "bfloat16", 5, 3) if cuda else (512, 256, 8_000, "float32", 3, 1)
    names = ("tokens", "hidden", "vocabulary", "dtype", "rounds", "warm_up")
    for name, default in zip(names, defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


def main() -> int:
    """Measure, write, print; 1 if a path of ours failed."""
    arguments, device = parse(), "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.table:
        update_readme()
        return 0
    output = arguments.output or RESULTS / f"loss_{device}{'_quick' if arguments.quick else ''}.json"
    recording = Recording(output, device)
    shape = Shape(arguments.tokens, arguments.hidden, arguments.vocabulary)
    settings = Settings(device, arguments.dtype, arguments.rounds, arguments.warm_up)
    measure(shape, providers(device), settings, recording)
    print(table(recording.rows), flush=True)
    settings = replace(settings, rounds=(settings.rounds + 1) // 2)
    chosen = [provider for provider in providers(device) if in_sweep(provider)]
    for name in arguments.sweep:
        for other in sweep_shapes(name, shape):
            start = len(recording.rows)
            measure(other, chosen, settings, recording)
            print(f"\n{other}\n{table(recording.rows[start:])}", flush=True)
    if "tokens" in arguments.sweep:
        plot(output)
    print(f"\nwritten to {output}")
    return int(any(row["provider"] == "ours" and row["note"] not in (None, "out of memory") for row in recording.rows))


if __name__ == "__main__":
    sys.exit(main())
