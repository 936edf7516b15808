"""Time, memory and error of one shape's providers, for `benchmarks.loss`."""

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.loss_problem import Problem, Shape, make_problem
from benchmarks.loss_providers import Provider
from benchmarks.memory import peak_bytes
from benchmarks.recording import Recording, obstacle, release_memory

ERROR_FACTOR, ERROR_FLOOR = 2.0, 1e-6
FLOOR_SLICE = 8192  # vocabulary entries of the floor's matmuls


@dataclass(frozen=True)
class Settings:
    """Where and how often."""

    device: str
    dtype: str
    rounds: int
    warm_up: int


def measure(shape: Shape, providers: list[Provider], settings: Settings, recording: Recording) -> None:
    """Add this shape's rows to the recording: first the light providers interleaved, then the heavy ones."""
    dtype = getattr(torch, settings.dtype)
    problem = make_problem(shape, dtype, settings.device)
    small = make_problem(shape.slice(), dtype, settings.device, seed=1)
    for heavy in (False, True):
        runnable = []
        for provider in providers:
            if provider.heavy == heavy:
                row = empty_row(provider, shape, settings.dtype)
                if check(row, provider, problem, small, settings.device):
                    runnable.append((row, provider))
                recording.add(row)
        time_rows(runnable, problem, settings, recording)


def empty_row(provider: Provider, shape: Shape, dtype: str) -> dict[str, Any]:
    """The row's fields, without numbers."""
    row: dict[str, Any] = {
        "provider": provider.name,
        "implementation": provider.implementation,
        "mode": provider.mode,
        "N": shape.tokens,
        "H": shape.hidden,
        "V": shape.vocabulary,
        "completions": shape.completions,
        "group_size": shape.group_size,
        "tied": shape.tied,
        "dtype": dtype,
    }
    numbers = ("forward_ms", "backward_ms", "total_ms", "floor_ms", "ratio_to_floor")
    return row | dict.fromkeys((*numbers, "peak_extra_bytes", "error", "eager_error", "note"))


def check(row: dict[str, Any], provider: Provider, problem: Problem, small: Problem, device: str) -> bool:
    """Fill in errors and memory; False, with a note, for a provider that is not to be timed."""
    try:
        row["error"], row["eager_error"] = errors(provider, small)
        if not row["error"] <= ERROR_FACTOR * row["eager_error"] + ERROR_FLOOR + provider.allowed:
            row["note"] = "error above its budget: no speed"
            return False
        run_once(provider, problem, device)  # compilers and caches leave their traces before memory is watched
        row["peak_extra_bytes"] = peak_extra_bytes(provider, problem, device)
    except Exception as error:  # whatever another library raises is that row's result
        row["note"] = obstacle(error)
    if row["note"]:
        release_memory()
    return row["note"] is None


def errors(provider: Provider, problem: Problem) -> tuple[float, float]:
    """Largest relative error (norm) of loss and gradients against float64: this provider's, and eager's."""
    truth = results_of(provider.truth, problem.to(torch.float64), provider)

    def error(function: Callable[[Problem], Tensor]) -> float:
        pairs = zip(results_of(function, problem, provider), truth, strict=True)
        return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)

    return error(provider.run), error(provider.truth)


def results_of(function: Callable[[Problem], Tensor], problem: Problem, provider: Provider) -> list[Tensor]:
    """The loss (or log-probs) and the gradients, in float64."""
    leaves = problem.leaves(provider.frozen_head)
    result = function(leaves.head_input())
    if not provider.backward:
        return [result.detach().double()]
    result.backward()
    gradients = [t.grad for t in (leaves.hidden, leaves.weight) if t.grad is not None]
    return [result.detach().double(), *(g.double() for g in gradients)]


def run_once(provider: Provider, problem: Problem, device: str) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass."""
    leaves = problem.leaves(provider.frozen_head)
    with torch.set_grad_enabled(provider.backward):
        inputs = leaves.head_input()
        start = now(device)
        loss = provider.run(inputs)
    middle = now(device)
    if provider.backward:
        loss.backward()
    return middle - start, now(device) - middle if provider.backward else 0.0


def floor_once(problem: Problem, device: str) -> tuple[float, float]:
    """Milliseconds of the 2NHV and of all 6NHV of matmuls, in slices of the vocabulary."""
    pieces = problem.weight.split(FLOOR_SLICE)
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
    before, peak = peak_bytes(lambda: run_once(provider, problem, device), device)
    gradients = problem.hidden.nbytes + (0 if provider.frozen_head else problem.weight.nbytes)
    return max(peak - before - (gradients if provider.backward else 0), 0)


def time_rows(
    runnable: list[tuple[dict[str, Any], Provider]], problem: Problem, settings: Settings, recording: Recording
) -> None:
    """Medians of interleaved runs, in another order every round; written after each."""
    times, floors = defaultdict(list), []
    for number in range(settings.warm_up + settings.rounds if runnable else 0):
        order = random.Random(number).sample(range(len(runnable)), len(runnable))
        floor = floor_once(problem, settings.device)
        timings = {i: run_once(runnable[i][1], problem, settings.device) for i in order}
        if number < settings.warm_up:
            continue
        floors.append(floor)
        for i, (row, provider) in enumerate(runnable):
            times[i].append(timings[i])
            fill_times(row, times[i], [floor[int(provider.backward)] for floor in floors])
        recording.write()


def fill_times(row: dict[str, Any], times: list[tuple[float, float]], floors: list[float]) -> None:
    """Put the medians so far into a row."""
    row["forward_ms"], row["backward_ms"] = (statistics.median(part) for part in zip(*times, strict=True))
    row["total_ms"] = statistics.median(sum(timing) for timing in times)
    row["floor_ms"] = statistics.median(floors)
    row["ratio_to_floor"] = row["total_ms"] / row["floor_ms"]
