"""SGD on two ranks; each saves what it trained on and the weights after each update. Run by test_two_ranks."""

import sys
from pathlib import Path

import lightning as L
import torch

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings


def reward(prompts, completions, **columns):
    """Varied; some completions have none, so that groups and ranks differ in size."""
    return [None if text.startswith("1") else len(set(text)) / 4 for text in completions]


def main(model: str, folder: Path) -> None:
    module = GVPOModule(
        model,
        reward,
        beta=0.5,
        rollout=RolloutSettings(group_size=4, prompts_per_rollout=12, prompts_per_update=6),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    prompts = [{"prompt": f"{n}+{n % 7}="} for n in range(24)]
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_steps=4,
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
                groups = [[g for m in update.micro_batches for g in m] for update in module.updates]
                rollouts.append(state | {"updates": groups})
            if module.microstep % 2 == 0:
                weights.append({name: p.detach().clone() for name, p in module.policy.named_parameters()})

    trainer.callbacks.append(Recorder())
    trainer.fit(module, RolloutLoader(prompts, module))
    loss = float(trainer.callback_metrics["loss"])
    torch.save({"rollouts": rollouts, "weights": weights, "loss": loss}, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
