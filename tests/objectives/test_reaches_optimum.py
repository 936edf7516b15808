"""The end-to-end truth: a run against a frozen reference ends at the accuracy that theory predicts."""

import lightning as L
import pytest
import torch

from gvpo_lightning.callbacks import OptimalityMeter
from gvpo_lightning.datamodule import PromptDataModule
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rewards import ExactAnswer
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


def train(arithmetic, beta: float, steps: int) -> tuple[float, float, dict[str, float]]:
    """Predicted and reached accuracy on held-out sums, both exact, and the last update's metrics."""
    L.seed_everything(0)
    module = GVPOModule(
        str(arithmetic / "model"),
        ExactAnswer(),
        beta=beta,
        rollout=RolloutSettings(group_size=16, prompts_per_rollout=32, prompts_per_update=8),
        generation=GenerationSettings(max_new_tokens=4, batch_size=512),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps),
    )
    meter = OptimalityMeter()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=10**6,
    )
    trainer.fit(module, datamodule=PromptDataModule(str(arithmetic / "sums"), validation_split="validation"))
    return meter.predicted, meter.reached, {name: float(v) for name, v in trainer.callback_metrics.items()}


def test_at_beta_1_the_predicted_accuracy_is_reached(arithmetic):
    predicted, reached, metrics = train(arithmetic, beta=1.0, steps=80)
    assert predicted == pytest.approx(0.661, abs=0.001)  # from a reference that is right 42% of the time
    assert reached == pytest.approx(predicted, abs=0.03)
    assert metrics["implicit_reward/slope"] == pytest.approx(1.0, abs=0.2)
    assert metrics["residual/rms"] < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_predicted_accuracy_is_reached_for_every_beta(arithmetic, beta):
    predicted, reached, _ = train(arithmetic, beta, steps=320)
    assert reached == pytest.approx(predicted, abs=0.02)
