"""Trains policies in several processes and saves distributed checkpoints of them. Run by test_export.

    sharded_script.py {fsdp2|tp|fsdp1} MODEL_FOLDER…

In each folder: `last.ckpt`, and `full.pt` with the whole weights as the strategy itself gathers them.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from gvpo_lightning import GenerationSettings, GVPOModule, RolloutLoader, RolloutSettings
from gvpo_lightning.policy import load_policy


def reward(prompts, completions, **columns):
    return [len(set(text)) / 4 for text in completions]


def shard(policy, mesh):
    for layer in policy.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


class Sharded(GVPOModule):
    """GVPO under FSDP2."""

    def configure_model(self):
        super().configure_model()
        shard(self.policy, self.device_mesh["data_parallel"])

    def on_fit_start(self):
        pass  # the comparison with eager differentiates parameters, which sharded ones are not


class Plain(L.LightningModule):
    """A language model trained on random tokens: what is saved of it is laid out like a GVPOModule's."""

    def __init__(self, model: str, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.policy = load_policy(model)

    def configure_model(self):
        if self.kind != "tp":
            return
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
        plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")} | {
            "mlp.down_proj": RowwiseParallel()
        }
        for layer in self.policy.model.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], plan)
        shard(self.policy, self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        ids = torch.randint(2, 12, (2, 8), generator=torch.Generator().manual_seed(batch_idx))
        return self.policy(input_ids=ids, labels=ids, use_cache=False).loss

    def train_dataloader(self):
        return range(2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class CPUStrategy(FSDPStrategy):
    """FSDP1, which Lightning offers on GPUs alone."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategy(kind: str) -> FSDPStrategy | ModelParallelStrategy:
    if kind == "fsdp1":
        return CPUStrategy(state_dict_type="sharded", process_group_backend="gloo")
    return ModelParallelStrategy(2, 2 if kind == "tp" else 1, save_distributed_checkpoint=True)


def gather(kind: str, module: L.LightningModule) -> dict[str, torch.Tensor]:
    if kind == "fsdp1":
        model = module.trainer.strategy.model
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: value.clone() for name, value in module.policy.state_dict().items()}
    return get_model_state_dict(module.policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def train(kind: str, folder: Path) -> None:
    if kind == "fsdp2":
        module = Sharded(
            str(folder),
            reward,
            beta=0.5,
            rollout=RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4),
            generation=GenerationSettings(max_new_tokens=4),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        )
        prompts = RolloutLoader([{"prompt": f"{n}+{n % 7}="} for n in range(8)], module)
    else:
        module, prompts = Plain(str(folder), kind), None
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy(kind),
        devices=4 if kind == "tp" else 2,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, prompts)
    trainer.save_checkpoint(folder / "last.ckpt")
    full = gather(kind, module)
    if trainer.global_rank == 0:
        torch.save(full, folder / "full.pt")


if __name__ == "__main__":
    for path in sys.argv[2:]:
        train(sys.argv[1], Path(path))
