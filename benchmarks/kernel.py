"""Time, memory and error of the fused loss against eager torch and a matmul floor; CPU or GPU.

    python -m benchmarks.kernel                       # a GPU if there is one, else the CPU
    python -m benchmarks.kernel --quick               # under a minute on a CPU
    python -m benchmarks.kernel --tokens 16384 --hidden 3584 --vocabulary 152064 --dtype bfloat16

Providers run interleaved, in another order every round; the table holds medians. `total / floor` divides by
matmuls alone: 6NHV, or 2NHV forward only, timed in the same rounds. A provider whose error against float64 (on a
smaller problem) is above its budget shows no speed. Without a GPU the GPU rows say so.
"""

import argparse
import ctypes
import datetime
import json
import platform
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.kernel_providers import (
    Problem,
    Provider,
    cross_entropy,
    eager_logprobs,
    eager_loss,
    make_problem,
    our_logprobs,
    ours,
    providers,
)
from gvpo_kernels import group_loss

RESULTS = Path(__file__).parent / "results"
ERROR_FACTOR = 2.0


def leaves_of(problem: Problem, frozen_head: bool) -> Problem:
    """Detached inputs that require the gradients asked for."""
    hidden = problem.hidden.detach().requires_grad_()
    return replace(problem, hidden=hidden, weight=problem.weight.detach().requires_grad_(not frozen_head))


def run_once(provider: Provider, problem: Problem, device: str) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass."""
    leaves = leaves_of(problem, provider.frozen_head)
    start = now(device)
    with torch.set_grad_enabled(provider.backward):
        loss = provider.run(leaves)
    middle = now(device)
    if provider.backward:
        loss.backward()
    return middle - start, now(device) - middle if provider.backward else 0.0


def floor_once(problem: Problem, device: str) -> tuple[float, float]:
    """Milliseconds of the 2NHV and of all 6NHV of matmuls, in slices of the vocabulary."""
    pieces = problem.weight.split(8192)
    gradients = [problem.hidden.new_ones(len(problem.hidden), len(piece)) for piece in (pieces[0], pieces[-1])]
    first = now(device)
    for piece in pieces:
        problem.hidden @ piece.T
    middle = now(device)
    for piece in pieces:
        grad = gradients[piece is pieces[-1]]
        _ = grad @ piece, grad.T @ problem.hidden
    return middle - first, now(device) - first


def now(device: str) -> float:
    """Milliseconds, with the device's work done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def peak_extra_bytes(provider: Provider, problem: Problem, device: str) -> int:
    """Peak memory of one run beyond the inputs and the gradients that it returns."""
    reset, read = cuda_peak() if device == "cuda" else resident_peak()
    before = reset()
    run_once(provider, problem, device)
    gradients = problem.hidden.nbytes + (0 if provider.frozen_head else problem.weight.nbytes)
    return max(read() - before - (gradients if provider.backward else 0), 0)


def cuda_peak() -> tuple[Callable[[], int], Callable[[], int]]:
    """Start to watch the allocator (returns what is allocated now); read its peak."""

    def reset() -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    return reset, torch.cuda.max_memory_allocated


def resident_peak() -> tuple[Callable[[], int], Callable[[], int]]:
    """The same for this process's resident memory (Linux), with what malloc keeps given back first."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    def reset() -> int:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return status("VmRSS")

    return reset, lambda: status("VmHWM")


def results_of(function: Callable[[Problem], Tensor], problem: Problem, provider: Provider) -> list[Tensor]:
    """The loss (or log-probs) and the gradients, in float64."""
    leaves = leaves_of(problem, provider.frozen_head)
    result = function(leaves)
    if not provider.backward:
        return [result.detach().double()]
    result.backward()
    gradients = [t.grad for t in (leaves.hidden, leaves.weight) if t.grad is not None]
    return [result.detach().double(), *(g.double() for g in gradients)]


def errors(provider: Provider, problem: Problem) -> tuple[float, float]:
    """Largest relative error (norm) of loss and gradients against float64: this provider's, and eager's.

    Nothing is dropped here, so that compaction is compared with the exact gradient too.
    """
    plain = cross_entropy if provider.truth == "cross-entropy" else eager_loss
    plain = plain if provider.backward else eager_logprobs
    truth = results_of(plain, problem.to(torch.float64), provider)

    def error(function: Callable[[Problem], Tensor]) -> float:
        pairs = zip(results_of(function, problem, provider), truth, strict=True)
        return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)

    return error(provider.run), error(plain)


def bound_for(problem: Problem, kept: float) -> float:
    """The `drop_below` that keeps this fraction of the tokens."""
    with torch.no_grad():
        leaf = our_logprobs(problem)
    leaf.requires_grad_()
    (coefficients,) = torch.autograd.grad(group_loss(leaf, *problem.batch).loss, leaf)
    bounds = -2 * coefficients.abs() * torch.expm1(leaf.detach()) / coefficients.abs().max()
    return float(bounds.sort().values[int((1 - kept) * len(bounds))])


def measure(arguments: argparse.Namespace, device: str) -> list[dict]:
    """Rows of one shape, all providers interleaved."""
    dtype, shape = getattr(torch, arguments.dtype), (arguments.tokens, arguments.hidden, arguments.vocabulary)
    problem = make_problem(*shape, dtype, device)
    problem = replace(problem, drop_below=bound_for(problem, 0.45))
    small = make_problem(min(shape[0], 256), shape[1], min(shape[2], 4096), dtype, device, seed=1)
    rows, runnable = [], []
    for provider in providers(device, arguments.compiled):
        row = dict(zip("NHV", shape, strict=True)) | {"dtype": arguments.dtype, "device": device}
        row |= {"provider": provider.name, "implementation": provider.implementation, "mode": provider.mode}
        row["error"], row["eager_error"] = errors(provider, small)
        rows.append(row)
        if row["error"] <= ERROR_FACTOR * row["eager_error"] + 1e-6:
            run_once(provider, problem, device)  # compilers and caches leave their traces before memory is watched
            row["peak_extra_bytes"] = peak_extra_bytes(provider, problem, device)
            runnable.append((row, provider))
        else:
            row["note"] = "error above its budget: no speed"
    time_rows(runnable, problem, device, arguments)
    return rows


def time_rows(runnable: list, problem: Problem, device: str, arguments: argparse.Namespace) -> None:
    """Add medians of interleaved runs to the rows."""
    times, floors = defaultdict(list), []
    for number in range(arguments.warm_up + arguments.rounds):
        order = random.Random(number).sample(range(len(runnable)), len(runnable))
        floor = floor_once(problem, device)
        timings = {i: run_once(runnable[i][1], problem, device) for i in order}
        if number >= arguments.warm_up:
            floors.append(floor)
            for i, timing in timings.items():
                times[i].append(timing)
    for i, (row, provider) in enumerate(runnable):
        row["forward_ms"], row["backward_ms"] = (statistics.median(part) for part in zip(*times[i], strict=True))
        row["total_ms"] = statistics.median(sum(timing) for timing in times[i])
        row["floor_ms"] = statistics.median(floor[int(provider.backward)] for floor in floors)
        row["ratio_to_floor"] = row["total_ms"] / row["floor_ms"]


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| provider | mode | forward ms | backward ms | total / floor | extra MB | error | eager's |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        line = f"| {row['provider']} ({row['implementation']}) | {row['mode']} |"
        if "total_ms" not in row:
            lines.append(f"{line} {row['note']} | | | | | |")
            continue
        line += f" {row['forward_ms']:.1f} | {row['backward_ms']:.1f} | {row['ratio_to_floor']:.2f} |"
        lines.append(f"{line} {row['peak_extra_bytes'] / 1e6:.0f} | {row['error']:.1e} | {row['eager_error']:.1e} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line; what is left out follows the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape and few rounds")
    parser.add_argument("--compiled", action="store_true", help="torch.compile'd eager too")
    parser.add_argument("--dtype")
    parser.add_argument("--output", type=Path)
    for name in ("--tokens", "--hidden", "--vocabulary", "--rounds", "--warm-up"):
        parser.add_argument(name, type=int)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    defaults = (16_384, 3_584, 152_064, "bfloat16", 10, 3) if cuda else (1_024, 512, 32_000, "float32", 5, 1)
    if arguments.quick:
        defaults = (4_096, 1_024, 32_768, "bfloat16", 5, 3) if cuda else (512, 256, 16_000, "float32", 3, 1)
    names = ("tokens", "hidden", "vocabulary", "dtype", "rounds", "warm_up")
    for name, default in zip(names, defaults, strict=True):
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    return arguments


def main() -> None:
    """Measure, write, print."""
    arguments, device = parse(), "cuda" if torch.cuda.is_available() else "cpu"
    rows = measure(arguments, device)
    if device == "cpu":
        missing = {"device": "cuda", "note": "not measured: no GPU here"}
        rows += [
            {"provider": p.name, "implementation": p.implementation, "mode": p.mode} | missing for p in ours("triton")
        ]
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "rows": rows,
    }
    output = arguments.output or RESULTS / f"kernel_{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print(
        f"\n{arguments.tokens} tokens, {arguments.hidden} hidden, {arguments.vocabulary} entries; written to {output}"
    )


if __name__ == "__main__":
    main()
