"""Where the fused loss's time goes on one shape: torch.profiler's kernels, as a text table and JSON.

python -m benchmarks.profile_loss [--mode recompute]       # writes benchmarks/results/profile_<device>_<mode>.*
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.loss_measure import floor_once, run_once
from benchmarks.loss_problem import Problem, Shape, make_problem
from benchmarks.loss_providers import Provider, providers
from benchmarks.recording import RESULTS, Recording

RUNS, SHOWN = 3, 25


def profile_provider(provider: Provider, problem: Problem, device: str) -> tuple[list[dict[str, Any]], str]:
    """Operations or kernels by their own time, per run, and the same as a table; one run before is not counted."""
    run_once(provider, problem, device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(RUNS):
            run_once(provider, problem, device)
    field = f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"
    averages = profiler.key_averages()
    events = sorted(averages, key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events) or 1
    rows = [
        {
            "name": event.key,
            "calls": event.count / RUNS,
            "ms": getattr(event, field) / RUNS / 1e3,
            "share": getattr(event, field) / total,
        }
        for event in events[:SHOWN]
    ]
    return rows, averages.table(sort_by=field, row_limit=SHOWN, max_name_column_width=80)


def main() -> None:
    """Command line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens, hidden, vocabulary = (16_384, 3_584, 152_064) if device == "cuda" else (512, 256, 8_000)
    ours = {p.mode: p for p in providers(device) if p.name == "ours"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=sorted(ours), default="recompute")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    shape = Shape(arguments.tokens, arguments.hidden, arguments.vocabulary)
    problem = make_problem(shape, torch.bfloat16 if device == "cuda" else torch.float32, device)
    floor_once(problem, device)
    path = arguments.results / f"profile_{device}_{arguments.mode.replace(' ', '_')}.json"
    recording = Recording(path, device)
    recording.header |= {"mode": arguments.mode, "shape": vars(shape), "floor_ms": floor_once(problem, device)[1]}
    rows, text = profile_provider(ours[arguments.mode], problem, device)
    recording.rows += rows
    recording.write()
    path.with_suffix(".txt").write_text(json.dumps(recording.header) + "\n" + text + "\n")
    print(text, f"\nwritten to {path}", sep="")


if __name__ == "__main__":
    main()
