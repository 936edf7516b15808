"""Trains policies in several processes and saves distributed checkpoints of them. Run by test_export."""

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings


def reward(prompts, completions, **columns):
    return [len(set(text)) / 4 for text in completions]


RANKS = {"fsdp1": 2, "fsdp2": 2, "tp": 4}

reward.in_process = True  # quicker than to start workers that import this file


class FSDPOnCPUForTests(FSDPStrategy):
    """FSDP1, which Lightning offers on GPUs alone."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy(kind: str) -> FSDPStrategy | ModelParallelStrategy:
    if kind == "fsdp1":
        return FSDPOnCPUForTests(state_dict_type="sharded", process_group_backend="gloo")
    return ModelParallelStrategy(2, 2 if kind == "tp" else 1, save_distributed_checkpoint=True)


def train(kind: str, folder: Path) -> None:
    module = GVPOModule(
        str(folder),
        reward,
        beta=0.5,
        rollout=RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
    )
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy(kind),
        devices=RANKS[kind],
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, RolloutLoader([{"prompt": f"{n}+{n % 7}="} for n in range(8)], module))
    trainer.save_checkpoint(folder / "last.ckpt")
    full = module.placement.full_state_dict(module.policy)
    if trainer.global_rank == 0:
        torch.save(full, folder / "full.pt")


def main(kind: str, *folders: Path) -> None:
    """On each rank; each folder gets `last.ckpt`, and `full.pt`: the whole weights as the strategy gathers them."""
    torch.set_num_threads(1)
    for folder in folders:
        train(kind, folder)
