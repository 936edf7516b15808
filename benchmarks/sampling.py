"""Does the optimum depend on who sampled? GVPO on the arithmetic task in five ways, GRPO on two files beside it.

    python -m benchmarks.sampling      # about 7 minutes on one core; writes benchmarks/results/sampling.{json,png}

Every run starts from the shipped policy, with the frozen reference and beta = 1, and is measured exactly: the
probability of the right answer on held-out sums, beside the one that the theory predicts. The completions come from

* `fresh`: the policy itself;
* `replay`: half from the policy, half from its earlier rollouts of the same prompts;
* `demonstrations`: 14 of 16 from the policy, 2 are the right answer from the dataset;
* `file`: a file that the reference sampled, and nothing else;
* `far file`: a file that the reference sampled at temperature 2: 11% of it is right, of the reference's own 42%.

All five must end within 0.03 of the prediction. Two more are shown beside them, without a promise. GVPO on `hot file`,
sampled at temperature 3: 5% is right, and much of the rest is no number that the reference would say. It ends 0.08
short, and still 0.06 with four times the updates, or with eight times the completions: full support is enough for the
optimum, not for reaching it soon. (A file that is as rarely right, from a policy trained towards wrong answers, did
reach it, within 0.02: that the right answer is rare is not what stops it.) And GRPO with importance ratios
(`benchmarks.sampling_baseline`) on the first two files.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.recording import RESULTS, Recording
from benchmarks.sampling_baseline import VARIANTS, train_grpo
from benchmarks.sampling_settings import Settings
from gvpo_lightning.callbacks import OptimalityMeter
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.policy.head import Scoring, score
from gvpo_lightning.policy.prepare import load_policy, load_tokenizer
from gvpo_lightning.rewards import ExactAnswer, Rewards
from gvpo_lightning.rollout.groups import sample_rollout
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from gvpo_lightning.sources import DemonstrationSettings, FileSettings, ReplaySettings, SourceSettings

ARITHMETIC = Path(__file__).parent.parent / "configs" / "arithmetic"
SAMPLERS = {"file": 1.0, "far file": 2.0, "hot file": 3.0}  # the reference's temperature when it sampled the file
REGIMES = ("fresh", "replay", "demonstrations", "file", "far file")  # each ends within TOLERANCE of the prediction
BASELINE_REGIMES = ("file", "far file")
TOLERANCE = 0.03
METRICS = ("residual/rms", "implicit_reward/slope")


class TracingMeter(OptimalityMeter):
    """Also measures before the first update and after every `every` updates; `trace` holds [update, accuracy]."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.trace: list[tuple[int, float]] = []

    def _add(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.measure(module.policy)
        assert self.reached is not None
        self.trace.append((trainer.global_step, self.reached))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The prediction, and where the policy starts."""
        super().on_train_start(trainer, pl_module)
        self._add(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One micro-batch is one update here."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._add(trainer, pl_module)


def prepare(folder: Path, settings: Settings, seed: int) -> None:
    """Write the sums with their answers as demonstrations, and a file for each of the samplers."""
    (folder / "sums").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = read_rows(ARITHMETIC / "sums" / f"{split}.jsonl")
        write_rows(folder / "sums" / f"{split}.jsonl", [row | {"demonstrations": [row["answer"]] * 2} for row in rows])
    rows = read_rows(ARITHMETIC / "sums" / "train.jsonl")
    for name, temperature in SAMPLERS.items():
        write_rows(folder / f"{name}.jsonl", record(rows, settings, temperature, seed))


def record(rows: list[dict[str, Any]], settings: Settings, temperature: float, seed: int) -> list[dict[str, Any]]:
    """What the reference samples at this temperature, in the offline format, with `sampler_logprobs`."""
    model, tokenizer = load_policy(str(ARITHMETIC / "model")), load_tokenizer(str(ARITHMETIC / "model"))
    sampler = GenerationSettings(settings.max_new_tokens, temperature, batch_size=2048)
    count = settings.completions_per_prompt
    rollout = sample_rollout(model, tokenizer, rows, count, sampler, Rewards(ExactAnswer()), seed=seed)
    values = score(model, rollout.batch, Scoring(temperature), batch_size=2048)
    logprobs = [v[:n].tolist() for v, n in zip(values, rollout.batch.lengths.tolist(), strict=True)]
    return [
        recorded | {"sampler_logprobs": logprobs[number * count : (number + 1) * count]}
        for number, recorded in enumerate(rollout.rows())
    ]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A JSON lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sources(regime: str, folder: Path, settings: Settings) -> SourceSettings:
    """Where a regime's completions come from."""
    if regime == "fresh":
        return SourceSettings()
    if regime == "replay":
        return SourceSettings(replay=ReplaySettings(count=0.5))
    if regime == "demonstrations":
        return SourceSettings(demonstrations=DemonstrationSettings(column="demonstrations", count=2))
    return SourceSettings(policy=0, file=FileSettings(path=str(folder / f"{regime}.jsonl"), count=settings.group_size))


def train_gvpo(regime: str, folder: Path, settings: Settings, seed: int) -> dict[str, Any]:
    """Train in one regime; the row of the results."""
    L.seed_everything(seed, verbose=False)
    module = GVPOModule(
        str(ARITHMETIC / "model"),
        ExactAnswer(),
        sources=sources(regime, folder, settings),
        beta=settings.beta,
        rollout=RolloutSettings(settings.group_size, settings.prompts_per_rollout, settings.prompts_per_update),
        generation=GenerationSettings(max_new_tokens=settings.max_new_tokens, batch_size=512),
        optimizer=settings.optimizer,
        lr_scheduler=settings.scheduler,
    )
    meter = TracingMeter(settings.trace_every)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=settings.updates,
        gradient_clip_val=settings.gradient_clip,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10**6,
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=PromptDataModule(str(folder / "sums"), validation_split="validation"))
    seconds = time.perf_counter() - started
    last = {name: float(trainer.callback_metrics[name]) for name in METRICS}
    assert meter.predicted is not None
    return make_row("GVPO", regime, seed, meter.predicted, meter.trace, seconds) | last


def make_row(
    objective: str, regime: str, seed: int, predicted: float, trace: list[tuple[int, float]], seconds: float
) -> dict[str, Any]:
    """One run's results; `predicted` is of GVPO's optimum, whatever the objective."""
    reached = trace[-1][1]
    return {
        "objective": objective,
        "regime": regime,
        "seed": seed,
        "predicted": predicted,
        "reached": reached,
        "difference": reached - predicted,
        "seconds": seconds,
        "trace": trace,
    }


def describe_file(name: str, folder: Path, seed: int) -> dict[str, Any]:
    """How a file was sampled, and how much of it is right."""
    rewards = torch.tensor([row["rewards"] for row in read_rows(folder / f"{name}.jsonl")])
    none_right = float((rewards.amax(dim=1) == 0).float().mean())
    right = float(rewards.mean())
    return {"file": name, "seed": seed, "temperature": SAMPLERS[name], "right": right, "groups_none_right": none_right}


def measure(folder: Path, settings: Settings, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of all runs of one seed, as they come."""
    for regime in (*REGIMES, "hot file"):
        row = train_gvpo(regime, folder, settings, seed)
        yield row
    validation = read_rows(folder / "sums" / "validation.jsonl")
    for variant in VARIANTS:
        for regime in BASELINE_REGIMES:
            started = time.perf_counter()
            data = read_rows(folder / f"{regime}.jsonl"), validation
            trace = train_grpo(variant, str(ARITHMETIC / "model"), data, settings, seed)
            yield make_row(variant, regime, seed, row["predicted"], trace, time.perf_counter() - started)


HEADER = "| objective | completions from | seed | predicted | reached | difference | slope | residual RMS | seconds |"


def line(row: dict[str, Any]) -> str:
    """A run as a line of a Markdown table."""
    cells = [row["objective"], row["regime"], str(row["seed"]), f"{row['predicted']:.3f}", f"{row['reached']:.3f}"]
    cells += [f"{row['difference']:+.3f}", *(f"{row[m]:.2f}" if m in row else "" for m in reversed(METRICS))]
    return "| " + " | ".join([*cells, f"{row['seconds']:.0f}"]) + " |"


def plot(path: Path) -> None:
    """Accuracy over updates, from the JSON file, as a PNG beside it; the first seed's runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(path.read_text())["rows"]
    rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2), sharey=True, layout="constrained")
    for axis, is_gvpo, title in ((axes[0], True, "GVPO"), (axes[1], False, "GRPO with importance ratios, on files")):
        for row in rows:
            if (row["objective"] == "GVPO") == is_gvpo:
                label = row["regime"] if is_gvpo else f"{row['objective']}, {row['regime']}"
                style = ":" if row["regime"] == "hot file" else "-"
                axis.plot(*zip(*row["trace"], strict=True), marker=".", linestyle=style, label=label)
        axis.axhline(rows[0]["predicted"], color="black", linestyle="--", label="predicted for GVPO")
        axis.set(title=title, xlabel="optimizer updates")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc=(0.6, 0.16))
    axes[0].set_ylabel("accuracy on held-out sums, exact")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=Settings.updates)
    parser.add_argument("--completions", type=int, default=Settings.completions_per_prompt, help="per prompt, in files")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampling.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the tensors are tiny
    settings = Settings(updates=options.updates, completions_per_prompt=options.completions)
    recording = Recording(options.output, "cpu")
    files: list[dict[str, Any]] = []
    recording.header |= {"settings": asdict(settings), "tolerance": TOLERANCE, "files": files}
    print(HEADER + "\n" + "|---" * 9 + "|", flush=True)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder), settings, seed)
            files += [describe_file(name, Path(folder), seed) for name in SAMPLERS]
            for row in measure(Path(folder), settings, seed):
                recording.add(row)
                print(line(row), flush=True)
    plot(options.output)


if __name__ == "__main__":
    main()
