"""The runs whose checkpoints lie in `earlier/`: what they train, how they are resumed, what is compared.

`earlier/` holds for each run of `RUNS` a checkpoint (`<name>.ckpt`) just as the code of commit 3850dd4 wrote it, in
`expected.pt` what that code found after loading it and what it had trained some updates later, and in `model/` the
policy that the runs start from: random initialisation may differ between CPUs and versions, a file does not. A
checkpoint that is a folder is packed (`<name>.ckpt.tar.xz`), since its files are mostly the same headers again and
again. Nothing in there is ever written again by later code, since users have checkpoints of that time too; a later
form of checkpoint gets a folder of its own beside it, which this writes with the code at hand:

    python -m tests.checkpointing.earlier_runs FOLDER

Whatever can move while checkpoints stay the same is out of bounds here: runs are built from public names alone.

The optimizer is SGD with momentum. Adam divides by the gradients' own size, which turns a rounding error in a gradient
near zero into a difference of a whole step, and the weights could not be compared between CPUs.
"""

import copy
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Qwen2Config, Qwen2ForCausalLM

from gvpo_lightning import (
    GenerationSettings,
    GVPOModule,
    ReferenceSettings,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)
from gvpo_lightning.callbacks import RunCheckpoint, RunSummary
from tests.forked import run_ranks

EARLIER = Path(__file__).parent / "earlier"
TOKENIZER = Path(__file__).parents[2] / "configs" / "arithmetic" / "model"
COUNTERS = ("microstep", "num_updates", "num_completion_tokens", "skipped_updates")
UPDATES_AFTER = 3  # how far a run is compared after it was resumed; in every run a new rollout is sampled within them
ROWS = [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(6)]


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        saved_after: optimizer updates before the checkpoint.
        settings: of the module, in place of those that all runs have.
        num_ranks: 2 = FSDP2, which saves a folder with a part of the weights and of the momentum for each rank.
        has_summary: with validation prompts, and a callback whose state is in the checkpoint.
    """

    saved_after: int
    settings: dict[str, Any] = field(default_factory=dict)
    num_ranks: int = 1
    has_summary: bool = False


# two updates a pass over a rollout: the checkpoint of an odd one lies within a rollout
SIZES: dict[str, Any] = {"group_size": 4, "prompts_per_rollout": 4, "prompts_per_update": 2}
RUNS = {
    "file": Run(
        4,
        {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 10)},
        has_summary=True,
    ),
    # the fourth and last update of the second rollout is still to come, in the second pass over it
    "mid_rollout": Run(7, {"rollout": RolloutSettings(**SIZES, epochs_per_rollout=2)}),
    # 6 prompts, 4 a rollout: in the next rollout all of them come back and find completions of earlier ones
    "replay": Run(5, {"sources": SourceSettings(replay=ReplaySettings(0.5))}),
    "ema": Run(5, {"reference": ReferenceSettings("ema", decay=0.5)}),
    "lora": Run(5, {"lora": {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}}),
    "folder": Run(5, num_ranks=2),
}


def reward(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """Varied, and a function of the texts alone: the digits that the answer has too, and a little for each other."""
    return [
        sum(0.5 if character in right else 0.1 for character in text)
        for text, right in zip(completions, answer, strict=True)
    ]


reward.in_process = True  # worker processes would cost more than all of the training


class Recorder(L.Callback):
    """What a run finds when it starts or has loaded a checkpoint, and what it has trained in the end."""

    def __init__(self) -> None:
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Before anything is trained; the recorder stands first among the callbacks."""
        self.weights = trained_weights(module)
        self.start = {
            "counters": {name: getattr(module.run, name) for name in COUNTERS},
            "seconds": dict(module.seconds),
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "lr": [group["lr"] for group in trainer.optimizers[0].param_groups],
            "weights": fingerprint(self.weights.values()),
            "momentum": fingerprint(momentum(trainer.optimizers[0])),
            "rollout": rollout_tensors(module),
            "callbacks": callback_states(trainer),
        }

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """After the last update."""
        self.end = {"weights": trained_weights(module), "rollout": rollout_tensors(module)}


def whole(tensor: Tensor) -> Tensor:
    """A copy; of a sharded tensor all parts together, for which every rank must call this."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trained_weights(module: Any) -> dict[str, Tensor]:
    """By the names that the policy has for them, which are those of its checkpoints."""
    return {name: whole(p) for name, p in module.policy.named_parameters() if p.requires_grad}


def momentum(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order of the parameters; empty at the start of a run."""
    states = [optimizer.state.get(p, {}) for group in optimizer.param_groups for p in group["params"]]
    return [whole(state["momentum_buffer"]) for state in states if "momentum_buffer" in state]


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Equal for tensors that are equal bit for bit: to load is to copy, so nothing may be rounded."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def rollout_tensors(module: Any) -> dict[str, Any] | None:
    """What identifies the rollout that is trained on; None where there is none, as between two of them."""
    if module.rollout is None:
        return None
    batch = module.rollout.batch
    mask = batch.completion_mask
    return {
        "index": module.rollout.index,
        "prompts": list(module.rollout.prompts),
        "completions": list(module.rollout.completions),
        "sources": list(module.rollout.sources),
        "token_ids": batch.completion_ids.masked_fill(~mask, 0),
        "lengths": batch.lengths,
        "group_ids": batch.group_ids,
        "rewards": batch.rewards.clone(),
        "reference_logprobs": batch.reference_logprobs.masked_fill(~mask, 0.0),
    }


def callback_states(trainer: L.Trainer) -> dict[str, Any]:
    """Of what a checkpoint holds of callbacks, that which does not change with the folder and the clock."""
    states: dict[str, Any] = {}
    for callback in trainer.callbacks:
        if isinstance(callback, RunCheckpoint):
            states["best"] = Path(callback.best_model_path).name
        elif isinstance(callback, RunSummary):
            states["summary"] = {k: v for k, v in callback.state_dict().items() if k != "seconds"}
    return copy.deepcopy(states)  # the run goes on writing into its own


def train(name: str, data: Path, folder: Path, checkpoint: Path | None, num_updates: int) -> Recorder:
    """Train up to the given number of updates, from a checkpoint or from the beginning, in this process.

    Args:
        data: where the policy's `model/` is.
        folder: for what the run itself writes.
    """
    torch.set_num_threads(1)  # with more, sums could be taken in another order
    L.seed_everything(0, verbose=False)
    run, recorder = RUNS[name], Recorder()
    settings: dict[str, Any] = {
        "tokenizer": str(TOKENIZER),
        "beta": 0.5,
        "rollout": RolloutSettings(**SIZES),
        "generation": GenerationSettings(max_new_tokens=4),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    }
    module = GVPOModule(str(data / "model"), reward, **(settings | run.settings))
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=True, timeout=timedelta(seconds=120)
    )
    saver = RunCheckpoint(folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        strategy=strategy if run.num_ranks > 1 else "auto",
        devices=run.num_ranks,
        max_steps=num_updates,
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[recorder, *([RunSummary()] if run.has_summary else []), saver],
    )
    validation = DataLoader(ROWS[:2], batch_size=2, collate_fn=list) if run.has_summary else None
    trainer.fit(module, RolloutLoader(ROWS, module), validation, ckpt_path=checkpoint)
    return recorder


def train_and_record(name: str, data: Path, folder: Path, checkpoint: Path | None, num_updates: int) -> None:
    """`train`, and what was recorded in one file for each rank."""
    recorder = train(name, data, folder, checkpoint, num_updates)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    torch.save({"start": recorder.start, "before": recorder.weights, "end": recorder.end}, folder / f"rank{rank}.pt")


def outcome(
    name: str, data: Path, folder: Path, checkpoint: Path | None, num_updates: int | None = None
) -> list[dict[str, Any]]:
    """`train` in as many processes as it takes; of each rank `start`, the weights `before`, and `end`.

    Without `num_updates` as many are trained as `expected.pt` holds the outcome of.
    """
    run = RUNS[name]
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (name, data, folder, checkpoint, num_updates or run.saved_after + UPDATES_AFTER)
    if run.num_ranks > 1:
        run_ranks(folder, run.num_ranks, train_and_record, *arguments)
    else:
        train_and_record(*arguments)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(run.num_ranks)]


def kept_checkpoint(name: str, data: Path, temporary: Path) -> Path:
    """Where the run's checkpoint lies; a packed one is unpacked into a temporary folder."""
    packed = data / f"{name}.ckpt.tar.xz"
    if not packed.exists():
        return data / f"{name}.ckpt"
    shutil.unpack_archive(packed, temporary / f"{name}.ckpt", filter="data")
    return temporary / f"{name}.ckpt"


def draws_by_seed() -> Tensor:
    """What torch draws from a seed as completions are sampled: other builds of torch draw other numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.multinomial(torch.full((64, 15), 1 / 15), 1).flatten()


def write_model(folder: Path) -> None:
    """A policy of some 3000 weights for the character tokenizer, with weights large enough to have preferences."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=15,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def main(data: Path) -> None:
    """Write the folder, which must not be there yet."""
    data.mkdir()
    write_model(data / "model")
    expected: dict[str, Any] = {"draws": draws_by_seed()}
    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as temporary:
            through = outcome(name, data, Path(temporary, "through"), None)
            saved = Path(temporary, "through", "checkpoints", f"step={run.saved_after}.ckpt")
            if saved.is_dir():
                shutil.make_archive(str(data / f"{name}.ckpt"), "xztar", saved)
            else:
                shutil.copyfile(saved, data / f"{name}.ckpt")
            resumed = outcome(name, data, Path(temporary, "resumed"), kept_checkpoint(name, data, Path(temporary)))
        for one, other in zip(through, resumed, strict=True):  # what is kept is what an uninterrupted run does
            weights = other["end"]["weights"]
            assert all(torch.equal(values, weights[key]) for key, values in one["end"]["weights"].items())
            assert other["start"]["step"] == run.saved_after
        expected[name] = {"start": resumed[0]["start"], "end": resumed[0]["end"]}
    torch.save(expected, data / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
