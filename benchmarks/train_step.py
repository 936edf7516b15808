"""One optimizer step of a whole policy: tokens per second, peak memory, and the largest batch that fits.

    python -m benchmarks.train_step                      # a GPU: Qwen2 of 0.5B, 1.5B and 7B (LoRA); a CPU: tiny ones
    python -m benchmarks.train_step --models 7B --batch 4

Random weights, gradient checkpointing, AdamW, ragged completions. Ours against eager torch and against TRL's GRPO loss
with its own chunked head and with Liger's: the same model, batch and machine, one after the other. Rows are written as
they come; on a GPU each path also searches its largest batch and is timed there.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_bytes
from benchmarks.recording import RESULTS, Recording, obstacle, release_memory
from benchmarks.report import step_table
from benchmarks.train_step_paths import SIZES, LossPath, Size, build_model, make_batch, paths

NUMBERS = ("batch", "tokens", "step_ms", "tokens_per_second", "peak_bytes", "peak_extra_bytes", "loss")


class Trainer:
    """A model with a path's loss and an optimizer; `step` runs one update."""

    def __init__(self, size: Size, path: LossPath, arguments: argparse.Namespace, device: str) -> None:
        self.path, self.size, self.device, self.arguments = path, size, device, arguments
        self.model = build_model(size, path.install, getattr(torch, arguments.dtype), device)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=device == "cuda")

    def batch(self, completions: int) -> Any:
        """A batch of so many completions."""
        lengths = (self.arguments.shortest, self.arguments.longest)
        return make_batch(completions, lengths, self.size.vocabulary, self.device)

    def step(self, batch: Any) -> float:
        """Policy forward and backward, loss, optimizer; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.path.loss(self.model, batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def fits(self, completions: int) -> bool:
        """Whether a step with so many completions goes through."""
        try:
            self.step(self.batch(completions))
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            return False
        finally:
            release_memory()
        return True

    def measure(self, completions: int) -> dict[str, Any]:
        """Numbers of a step with so many completions; the first one warms up and gives the loss."""
        batch = self.batch(completions)
        loss, times = self.step(batch), []
        for _ in range(self.arguments.steps):
            start = time.perf_counter()
            self.step(batch)
            if self.device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        self.optimizer.zero_grad(set_to_none=True)
        before, peak = peak_bytes(lambda: self.step(batch), self.device)
        tokens, seconds = int(batch.prompt_mask.sum() + batch.completion_mask.sum()), statistics.median(times)
        values = (completions, tokens, 1e3 * seconds, tokens / seconds, peak, peak - before, loss)
        return dict(zip(NUMBERS, values, strict=True))


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The most completions that fit, to within an eighth: doubling from 1, then bisection; 0 if none."""
    good, bad = 0, 1
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def measure_path(name: str, path: LossPath, arguments: argparse.Namespace, device: str, recording: Recording) -> None:
    """Add a path's row, and fill in what can be measured."""
    row: dict[str, Any] = {"provider": path.name, "implementation": path.implementation, "objective": path.objective}
    row |= {"model": name, "lora": SIZES[name].lora, "dtype": arguments.dtype}
    row |= dict.fromkeys((*NUMBERS, "largest", "note"))
    recording.add(row)
    trainer = None
    try:
        trainer = Trainer(SIZES[name], path, arguments, device)
        if trainer.fits(arguments.batch):
            row |= trainer.measure(arguments.batch)
        else:
            row["note"] = f"out of memory at {arguments.batch} completions"
        recording.write()
        if device == "cuda" and (largest := largest_batch(trainer.fits, arguments.limit)):
            row["largest"] = trainer.measure(largest)
    except Exception as error:  # whatever another library raises is that row's result
        row["note"] = obstacle(error)
    del trainer
    gc.collect()
    release_memory()
    recording.write()


def parse(device: str) -> argparse.Namespace:
    """The command line; what is left out follows the device."""
    cuda = device == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["0.5B", "1.5B", "7B"] if cuda else ["tiny", "tiny-lora"]
    parser.add_argument("--models", nargs="+", choices=sorted(SIZES), default=models)
    parser.add_argument("--batch", type=int, default=8, help="completions a step")
    parser.add_argument("--shortest", type=int, default=512 if cuda else 64, help="tokens of the shortest completion")
    parser.add_argument("--longest", type=int, default=4_096 if cuda else 512)
    parser.add_argument("--limit", type=int, default=256, help="where the search for the largest batch stops")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--output", type=Path, default=RESULTS / f"train_step_{device}.json")
    return parser.parse_args()


def main() -> None:
    """Measure, write, print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = parse(device)
    recording = Recording(arguments.output, device)
    recording.header["lengths"] = [arguments.shortest, arguments.longest]
    for name in arguments.models:
        for path in paths():
            measure_path(name, path, arguments, device, recording)
        print(step_table([row for row in recording.rows if row["model"] == name]), flush=True)
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
