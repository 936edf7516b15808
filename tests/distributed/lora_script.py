"""Trains an adapter from the settings under one strategy, in as many processes as it takes. Run by test_lora.

On completions of its own; stopped and resumed within a rollout. The frozen reference is the policy without the adapter.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gvpo_lightning import GenerationSettings, GVPOModule, LoadingSettings, RolloutLoader, RolloutSettings
from tests.distributed.train_script import ROWS, make_trainer, reward, whole_weights

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]}


def train(model: str, name: str, loading: LoadingSettings, path: Path | None = None, **trainer_arguments: Any) -> Any:
    """Six updates of two rollouts, or the rest of them; the trained module."""
    L.seed_everything(0, verbose=False)
    module = GVPOModule(
        model,
        reward,
        loading=loading,
        lora=LORA,
        beta=0.5,
        rollout=RolloutSettings(group_size=5, prompts_per_rollout=7, prompts_per_update=3, micro_batch_size=5),
        generation=GenerationSettings(max_new_tokens=4),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        gradient_checkpointing=True,
    )
    trainer = make_trainer(name, Path.cwd(), **({"max_steps": 6, "accumulate_grad_batches": 3} | trainer_arguments))
    trainer.fit(module, RolloutLoader(ROWS, module), ckpt_path=path)
    return module


def adapter_of(module: GVPOModule) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in whole_weights(module).items() if "lora_" in name}


def main(model: str, folder: Path, name: str, loading: LoadingSettings) -> None:
    """What came of it, by rank."""
    torch.set_num_threads(1)
    saver = ModelCheckpoint(folder / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    through = train(model, name, loading, callbacks=[saver], enable_checkpointing=True)
    result = {"through": adapter_of(through), "reference": through.rollout.batch.reference_logprobs.cpu()}
    result["kind"] = type(through.reference).__name__
    through.export(folder / f"export-{name}")
    result["resumed"] = adapter_of(train(model, name, loading, folder / name / "step=2.ckpt"))
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save(result, folder / f"{name} {rank}.pt")
