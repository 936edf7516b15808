"""SGD on two ranks; each saves what it trained on and the weights after each update. Run by test_two_ranks."""

import sys
from pathlib import Path

import lightning as L
import torch

from gvpo_lightning import (
    GenerationSettings,
    GVPOModule,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)


def reward(prompts, completions, **columns):
    """Varied; some completions have none, so that groups and ranks differ in size."""
    return [None if text.startswith("1") else len(set(text)) / 4 for text in completions]


SETTINGS = {
    "even": {"rollout": RolloutSettings(group_size=4, prompts_per_rollout=12, prompts_per_update=6)},
    # 7 prompts for 2 ranks in 2 updates, groups that are cut over micro-batches, replay from the second pass on
    "uneven": {
        "rollout": RolloutSettings(group_size=4, prompts_per_rollout=7, prompts_per_update=4, micro_batch_size=4),
        "sources": SourceSettings(replay=ReplaySettings(2)),
    },
}


def main(model: str, folder: Path, settings: str) -> None:
    module = GVPOModule(
        model,
        reward,
        beta=0.5,
        **SETTINGS[settings],
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    prompts = [{"prompt": f"{n}+{n % 7}="} for n in range(24)]
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_steps=4 if settings == "even" else 12,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rollouts, weights = [], []

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if not rollouts or module.rollout.index != rollouts[-1]["index"]:
                state = module.rollout.state_dict()
                ids = module.rollout.batch.group_ids
                groups = [
                    ids[[row for rows in update.micro_batches for row in rows]].unique().tolist()
                    for update in module.updates
                ]
                rollouts.append(state | {"updates": groups})
            if module.microstep % 2 == 0:
                weights.append({name: p.detach().clone() for name, p in module.policy.named_parameters()})

    trainer.callbacks.append(Recorder())
    trainer.fit(module, RolloutLoader(prompts, module))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save({"rollouts": rollouts, "weights": weights, "metrics": metrics}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
