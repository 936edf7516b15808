"""One block at the end of a run that says what came of it, and the files behind it."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.panel import Panel

from gvpo_lightning.callbacks.optimality import OptimalityMeter, validation_rows
from gvpo_lightning.data.rows import Row
from gvpo_lightning.evaluation.sampled import SampledEvaluation
from gvpo_lightning.module import GVPOModule

CURVES = ("reward/mean", "loss", "residual/rms")


class RunSummary(L.Callback):
    """Measures the validation reward before and after training; writes what a run leaves behind.

    In the run's folder (the trainer's default_root_dir): `summary.json`, `learning_curve.png`, and `export/`,
    a Hugging Face folder with the policy, its tokenizer, generation config and model card.

    Args:
        merge_adapter: export a policy with an adapter merged into one model, instead of the adapter alone.

    The keys of the summary:

    * `reward_before`, `reward_after`: mean reward of completions sampled at temperature 1 on the validation
      prompts, whatever the run's own sampler; null without validation prompts.
    * `predicted_optimum`, `reached_optimum`: exact accuracies from `OptimalityMeter`, or null.
    * `seconds`: `total` of the run and, of it, `rollout`, `reward`, `reference`, `train`; evaluation and
      loading are the rest.
    * `steps`, `export_dir` (relative to the run's folder), `residual_rms`, `implicit_reward_slope`.
    """

    def __init__(self, merge_adapter: bool = False) -> None:
        self.merge_adapter = merge_adapter
        self.reward_before: float | None = None
        self.history: list[dict[str, float]] = []
        self._started = time.perf_counter()
        self._is_written = False

    def state_dict(self) -> dict[str, Any]:
        """So that a resumed run's summary covers the whole run."""
        return {"reward_before": self.reward_before, "history": self.history, "seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self.reward_before, self.history = state["reward_before"], state["history"]
        self._started = time.perf_counter() - state["seconds"]

    def _seconds(self) -> float:
        return time.perf_counter() - self._started

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the clock, and forget an earlier fit; a checkpoint that this one goes on from is loaded later."""
        self._started, self._is_written = time.perf_counter(), False
        if stage == "fit":
            self.reward_before, self.history = None, []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The reward to start from."""
        assert isinstance(pl_module, GVPOModule)
        if self.reward_before is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            data = getattr(trainer, "datamodule", None)
            rows = validation_rows(trainer.val_dataloaders, data, trainer.limit_val_batches)
            self.reward_before = mean_reward(rows, pl_module.evaluation, pl_module.policy)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One point of the learning curve a rollout."""
        assert isinstance(pl_module, GVPOModule)
        if pl_module.microstep % pl_module.micro_batches_per_rollout == 0:
            values = {name: float(trainer.callback_metrics[name]) for name in CURVES}
            self.history.append({"step": trainer.global_step} | values)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure, write, show."""
        assert isinstance(pl_module, GVPOModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return  # a trial must not overwrite what a run has left
        data = getattr(trainer, "datamodule", None)
        rows = validation_rows(trainer.val_dataloaders, data, trainer.limit_val_batches)
        reward_after = mean_reward(rows, pl_module.evaluation, pl_module.policy)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        meters = [callback for callback in trainer.callbacks if isinstance(callback, OptimalityMeter)]  # type: ignore[attr-defined]
        metrics, seconds = trainer.callback_metrics, pl_module.seconds
        summary = {
            "reward_before": self.reward_before,
            "reward_after": reward_after,
            "predicted_optimum": meters[0].predicted if meters else None,
            "reached_optimum": meters[0].reached if meters else None,
            "residual_rms": _number(metrics.get("residual/rms")),
            "implicit_reward_slope": _number(metrics.get("implicit_reward/slope")),
            "steps": trainer.global_step,
            "seconds": {"total": self._seconds(), **seconds},
            "export_dir": "export",
        }
        self._write(folder, summary)
        pl_module.export(folder / "export", merge_adapter=self.merge_adapter, summary=summary)
        self._is_written = True

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of a run that was resumed at its end, where nothing is trained: it may have been killed before it said so."""
        written = Path(trainer.default_root_dir) / "summary.json"
        of_this_end = written.exists() and json.loads(written.read_text())["steps"] == trainer.global_step
        if not self._is_written and not of_this_end:
            pl_module.to(trainer.strategy.root_device)  # from where the strategy's teardown has put it
            self.on_train_end(trainer, pl_module)

    @rank_zero_only
    def _write(self, folder: Path, summary: dict[str, Any]) -> None:
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot_learning_curve(self.history, folder / "learning_curve.png")
        Console().print(Panel(describe(summary), title=f"run summary: {folder}", expand=False))


def mean_reward(rows: list[Row], evaluation: SampledEvaluation, policy: Any) -> float | None:
    """Mean reward of sampled completions of this rank's prompts, over all ranks; None without any."""
    sampling = evaluation.sampling
    if not rows or sampling.rewards is None:
        return None
    sampler = replace(sampling.generation, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    size, sums = 64, torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = evaluation.sample(policy, part, "summary", start, generation=sampler).batch
        sums += torch.stack([batch.rewards[batch.kept].double().sum(), batch.kept.sum()])
    total, count = sampling.placement.ranks.sum(sums.to(sampling.placement.device)).tolist()
    return total / count if count else None


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""

    def shown(value: float | None) -> str:
        return "n/a" if value is None else f"{value:.3f}"

    seconds = dict(summary["seconds"])
    total = seconds.pop("total")
    split = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return "\n".join(
        [
            f"validation reward   {shown(summary['reward_before'])} -> {shown(summary['reward_after'])}",
            f"predicted optimum   {shown(summary['predicted_optimum'])}"
            f"   reached, exactly: {shown(summary['reached_optimum'])}",
            f"residual RMS        {shown(summary['residual_rms'])}"
            f"   implicit-reward slope: {shown(summary['implicit_reward_slope'])}",
            f"optimizer steps     {summary['steps']}",
            f"seconds             {total:.0f} ({split})",
            f"exported policy     {summary['export_dir']}/",
        ]
    )


def plot_learning_curve(history: list[dict[str, float]], path: Path) -> None:
    """One panel a curve over optimizer steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        axes.plot([point["step"] for point in history], [point[name] for point in history])
        axes.set(xlabel="optimizer step", title=name)
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)
