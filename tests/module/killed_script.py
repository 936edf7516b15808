"""Trains on fresh, replayed and demonstrated completions; kills itself where told. Run by test_killed."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning import (
    DemonstrationSettings,
    GenerationSettings,
    GVPOModule,
    ReferenceSettings,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)

CALLS = {"reward": 0}


def main(model: str, folder: str, kill_in: str, kill_at: int) -> None:
    def strike(phase: str, count: int) -> None:
        if (phase, count) == (kill_in, kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    def reward(prompts, completions, answer):
        CALLS["reward"] += 1
        strike("reward", CALLS["reward"])
        return [float(text == a) + 0.01 * len(text) for text, a in zip(completions, answer, strict=True)]

    class Killer(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            strike("training", module.microstep)

    L.seed_everything(0)
    module = GVPOModule(
        model,
        reward,
        reference=ReferenceSettings("ema", decay=0.5),
        sources=SourceSettings(replay=ReplaySettings(2), demonstrations=DemonstrationSettings("answer")),
        rollout=RolloutSettings(group_size=6, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=9),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    rows = [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(12)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=10,
        accumulate_grad_batches=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=1), Killer()],
    )
    last = Path(folder) / "last.ckpt"
    trainer.fit(module, RolloutLoader(rows, module), ckpt_path=last if last.exists() else None)
    torch.save([p.detach() for p in module.policy.parameters()], Path(folder) / "weights.pt")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
