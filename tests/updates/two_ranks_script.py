"""SGD on several ranks; each saves what it trained on and the weights after each update. Run by test_two_ranks."""

import os
from dataclasses import dataclass
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
from gvpo_lightning.objectives.settings import ObjectiveKind
from gvpo_lightning.rewards import Reward

LR = 0.1


def patchy(prompts, completions, **columns):
    """Varied; some completions have none, so that groups and ranks differ in size."""
    return [
        None if len(text) % 3 == 1 or text.startswith("4") else len(set(text)) / 4 + len(text) for text in completions
    ]


def distinct(prompts, completions, **columns):
    """No two of a group that ranks have sampled together have the same."""
    first = 10 * int(os.environ.get("LOCAL_RANK", "0"))
    return [first + number + len(text) / 8 for number, text in enumerate(completions)]


def few(prompts, completions, **columns):
    """One of the first rank's completions has a reward, two of the second's."""
    count = 1 + int(os.environ.get("LOCAL_RANK", "0"))
    return [reward if n < count else None for n, reward in enumerate(distinct(prompts, completions))]


for function in (patchy, distinct, few):  # they look at all of a rank's completions
    function.in_process = True


@dataclass(frozen=True)
class Run:
    """What is run: on how many ranks, with how many micro-batches and updates."""

    rollout: RolloutSettings
    reward: Reward = patchy
    replay: float = 0.0
    ranks: int = 2
    accumulate: int = 2
    updates: int = 4
    objective: ObjectiveKind = "gvpo"


RUNS = {
    "even": Run(RolloutSettings(group_size=4, prompts_per_rollout=12, prompts_per_update=6)),
    # 7 prompts in 2 updates, groups that are cut over micro-batches and ranks, replay from the second pass on
    "uneven": Run(
        RolloutSettings(group_size=4, prompts_per_rollout=7, prompts_per_update=4, micro_batch_size=3),
        replay=2,
        accumulate=3,
        updates=12,
    ),
    # the same without replay, of an objective that couples groups and of one that does not
    **{
        kind: Run(
            RolloutSettings(group_size=4, prompts_per_rollout=7, prompts_per_update=4, micro_batch_size=3),
            accumulate=3,
            objective=kind,
        )
        for kind in ("dpo", "policy_gradient")
    },
    # one group, of which three completions are kept: two are trained on one rank, one on the other
    "spanning": Run(
        RolloutSettings(group_size=8, prompts_per_rollout=1, prompts_per_update=1), reward=few, accumulate=1
    ),
    # one group that fits into one micro-batch: all that the other rank trains is a dropped completion
    "nothing to train": Run(
        RolloutSettings(group_size=3, prompts_per_rollout=1, prompts_per_update=1, micro_batch_size=3), reward=distinct
    ),
    # two completions for three ranks: one samples, rewards and scores none, another trains none
    "nothing to sample": Run(
        RolloutSettings(group_size=2, prompts_per_rollout=1, prompts_per_update=1), reward=distinct, ranks=3
    ),
}


def train(model: str, folder: Path, name: str) -> None:
    run = RUNS[name]
    module = GVPOModule(
        model,
        run.reward,
        beta=0.5,
        rollout=run.rollout,
        sources=SourceSettings(replay=ReplaySettings(run.replay) if run.replay else None),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
        objective=run.objective,
    )
    prompts = [{"prompt": f"{n}+{n % 7}="} for n in range(24)]
    trainer = L.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=run.ranks,
        max_steps=run.updates,
        accumulate_grad_batches=run.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    rollouts, weights = [], []

    class Recorder(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if not rollouts or module.rollout.index != rollouts[-1]["index"]:
                updates = [list(map(list, update.micro_batches)) for update in module.updates]
                rollouts.append(module.rollout.state_dict() | {"updates": updates})
            if module.microstep % run.accumulate == 0:
                weights.append({name: p.detach().clone() for name, p in module.policy.named_parameters()})

    trainer.callbacks.append(Recorder())
    trainer.fit(module, RolloutLoader(prompts, module))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.save(
        {"rollouts": rollouts, "weights": weights, "metrics": metrics}, folder / f"{name} {trainer.global_rank}.pt"
    )


def main(model: str, folder: Path, names: list[str]) -> None:
    """In the same processes, whose start is what takes time."""
    torch.set_num_threads(1)
    for name in names:
        train(model, folder, name)
