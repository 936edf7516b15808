"""Trains tiny policies under one strategy, in as many processes as it takes. Run by test_strategies.

On recorded completions, the same for every strategy; as "sampled" on completions of its own, stopped and resumed.
"""

import os
import random
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import utilities
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gvpo_lightning import (
    FileSettings,
    GenerationSettings,
    GVPOModule,
    ReferenceSettings,
    ReplaySettings,
    RolloutLoader,
    RolloutSettings,
    SourceSettings,
)
from gvpo_lightning.distributed import sharding
from gvpo_lightning.distributed.sharding import local_tensor
from gvpo_lightning.policy.prepare import load_tokenizer
from gvpo_lightning.rollout.collect import Collector

TIMEOUT = timedelta(seconds=120)
UPDATES, LR, CLIP = 10, 0.2, 0.3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
# what is trained, and what is set for it
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {},
    "qwen3": {},
    "llama": {},
    "mistral": {},
    "lora": {},
    "checkpointing": {"gradient_checkpointing": True},
    "ema": {"reference": ReferenceSettings("ema", decay=0.5)},
    "bf16": {},
    "packed": {"padding_free": True},
    "compiled": {"torch_compile": True, "gradient_checkpointing": True},
    "turns": {},
    "other": {},
    "dpo": {"objective": "dpo"},
    "sft": {"objective": "sft"},  # whose loss is not one of known coefficients where groups are cut
}


class FSDPOnCPUForTests(FSDPStrategy):
    """FSDPStrategy, which refuses CPUs, for tests alone; checkpoints of one file would crash there."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


STRATEGIES = {
    "single": lambda: ("auto", 1),
    "ddp": lambda: (DDPStrategy(timeout=TIMEOUT), 2),
    "fsdp1": lambda: (FSDPOnCPUForTests(state_dict_type="sharded", timeout=TIMEOUT), 2),
    "fsdp2": lambda: (ModelParallelStrategy(2, 1, timeout=TIMEOUT), 2),
    "tp": lambda: (ModelParallelStrategy(1, 2, timeout=TIMEOUT), 2),
    "fsdp2_tp": lambda: (ModelParallelStrategy(2, 2, timeout=TIMEOUT), 4),
}


def gpu_strategies(num_gpus: int) -> dict[str, Any]:
    """Those that so many GPUs, one or two, can run over NCCL."""
    half = {"tp": lambda: (ModelParallelStrategy(1, 2, timeout=TIMEOUT), 2)} if num_gpus > 1 else {}
    return half | {
        "single": lambda: ("auto", 1),
        "ddp": lambda: (DDPStrategy(timeout=TIMEOUT), num_gpus),
        "fsdp1": lambda: (FSDPStrategy(state_dict_type="sharded", timeout=TIMEOUT), num_gpus),
        "fsdp2": lambda: (ModelParallelStrategy(num_gpus, 1, timeout=TIMEOUT), num_gpus),
    }


def make_policy(variant: str, vocab_size: int) -> PreTrainedModel:
    """The same weights in every process."""
    torch.manual_seed(0)
    kind = variant if variant in ("qwen3", "llama", "mistral") else "qwen2"
    config = AutoConfig.for_model(kind, vocab_size=vocab_size, tie_word_embeddings=variant == "tied", **SIZES)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if variant == "lora":
        policy = get_peft_model(policy, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # which is 0, so that lora_A would have no gradient at first
                parameter.data.normal_(std=0.1)
    return policy


class Recorder(L.Callback):
    """Of the fourth update, the weights and the gradients before clipping, whole; and the rows that it trains."""

    def __init__(self):
        self.seen: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step != 3:
            return
        self.seen = {"weights": whole_weights(module), "gradients": whole_gradients(module)}
        self.seen["rollout"] = module.rollout.state_dict()
        self.seen["rows"] = module.updates[trainer.global_step % len(module.updates)].rows


def whole_weights(module: GVPOModule) -> dict[str, Tensor]:
    state = module.placement.full_state_dict(module.policy)
    state = module.policy.state_dict() if state is None else state
    return {name: value.clone() for name, value in state.items()}


def whole_gradients(module: GVPOModule) -> dict[str, Tensor]:
    strategy = module.trainer.strategy
    is_fsdp1 = isinstance(strategy, FSDPStrategy)
    with FullyShardedDataParallel.summon_full_params(strategy.model, with_grads=True) if is_fsdp1 else nullcontext():
        return {
            name.replace("_fsdp_wrapped_module.", ""): (
                p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            ).clone()
            for name, p in module.policy.named_parameters()
            if p.requires_grad and p.grad is not None
        }


def make_module(model: str, variant: str, **settings: Any) -> GVPOModule:
    tokenizer = load_tokenizer(model)
    arguments: dict[str, Any] = {
        "tokenizer": tokenizer,
        "beta": 0.5,
        "rollout": RolloutSettings(group_size=6, prompts_per_rollout=7, prompts_per_update=3),
        "generation": GenerationSettings(max_new_tokens=4),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.2, 1.0, 10),
    }
    policy = model if variant == "turns" else make_policy(variant, len(tokenizer))
    if variant == "other":
        settings |= {"reference": ReferenceSettings("frozen", model=model)}
    return GVPOModule(policy, **(arguments | VARIANTS.get(variant, {}) | settings))


def make_trainer(name: str, folder: Path, **settings: Any) -> L.Trainer:
    on_gpus = os.environ.get("GVPO_TEST_ACCELERATOR") == "gpu"
    strategy, devices = (gpu_strategies(min(2, torch.cuda.device_count())) if on_gpus else STRATEGIES)[name]()
    arguments: dict[str, Any] = {
        "max_steps": UPDATES,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": CLIP,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(
        accelerator="gpu" if on_gpus else "cpu", strategy=strategy, devices=devices, **(arguments | settings)
    )


GATHERS = ("all_gather_into_tensor", "all_gather_single")  # what FSDP2 calls, in one version of torch or another
ROWS = [{"prompt": f"{n}+{n % 7}="} for n in range(12)]


def train_recorded(model: str, folder: Path, name: str, variant: str) -> dict[str, Any]:
    """Ten updates on the recorded completions."""
    module = make_module(
        model,
        variant,
        sources=SourceSettings(policy=0, file=FileSettings(str(folder / "completions.jsonl"))),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=LR),
    )
    recorder, loading = Recorder(), []
    if variant == "turns":  # no room for two models at once
        sharding.available_host_memory = lambda: 1
        load = module._load
        module._load = lambda: loading.extend([time.monotonic(), load(), time.monotonic()])
    precision = "bf16-mixed" if variant == "bf16" else "32-true"
    trainer = make_trainer(name, folder, precision=precision, callbacks=[recorder])
    trainer.fit(module, RolloutLoader(ROWS, module))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    module.export(folder / f"export-{name}-{variant}")
    return {"weights": whole_weights(module), "metrics": metrics, "fourth": recorder.seen, "loading": loading}


def try_to_compile(model: str, name: str) -> dict[str, Any]:
    """What is said where it can't be done."""
    try:
        module = make_module(model, "full", reward=reward, torch_compile=True)
        make_trainer(name, Path.cwd()).fit(module, RolloutLoader(ROWS, module))
    except ValueError as error:
        return {"refusal": str(error)}
    return {"weights": whole_weights(module)}


def reward(prompts, completions, **columns):
    """Varied; some completions have none."""
    return [None if text.startswith("1") else len(set(text)) / 4 for text in completions]


reward.in_process = True  # quicker than to start workers that import this file


def train_sampled(model: str, name: str, path: Path | None = None, **trainer_arguments: Any) -> dict[str, Any]:
    """Eight updates of three rollouts on sampled and replayed completions with validation, or the rest of them."""
    L.seed_everything(0, verbose=False)
    module = make_module(
        model,
        "sampled",
        reward=reward,
        reference=ReferenceSettings("ema", decay=0.5),
        sources=SourceSettings(replay=ReplaySettings(2)),
        rollout=RolloutSettings(group_size=5, prompts_per_rollout=7, prompts_per_update=3, micro_batch_size=5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    settings: dict[str, Any] = {"max_steps": 8, "accumulate_grad_batches": 3, "val_check_interval": 9}
    trainer = make_trainer(name, Path.cwd(), **(settings | trainer_arguments))
    validation = DataLoader(ROWS[:5], batch_size=2, collate_fn=list)
    trainer.fit(module, RolloutLoader(ROWS, module), validation, ckpt_path=path)
    reward_mean = float(trainer.callback_metrics.get("validation/reward/mean", -1))
    return {"weights": whole_weights(module), "validation": reward_mean, "prompts": module.rollout.prompts}


def try_others(model: str, name: str) -> dict[str, Any]:
    """What else a module does: it validates, fits and predicts for an uneven number of prompts, all in one module.

    The reward is another one whenever it is asked, as a judge's is, and gives rank 0 none in validation.
    """
    asked = random.Random(os.environ.get("LOCAL_RANK"))

    def judge(prompts, completions, **columns):
        return [None if module.trainer.validating and module.global_rank == 0 else asked.random() for _ in completions]

    judge.in_process = True
    module = make_module(
        model,
        "sampled",
        reward=judge,
        rollout=RolloutSettings(group_size=5, prompts_per_rollout=7, prompts_per_update=3, micro_batch_size=5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    utilities._distributed_is_initialized = lambda: False  # with gloo Lightning would not use inference mode
    five = DataLoader(ROWS[:5], batch_size=2, collate_fn=list)
    gathers: list[tuple[int, bool]] = []
    sample_share = Collector.sample_share

    def count_gathers(*arguments):
        calls, before = [], {n: getattr(torch.distributed, n) for n in GATHERS if hasattr(torch.distributed, n)}
        for key, gather in before.items():
            setattr(torch.distributed, key, lambda *a, gather=gather, **k: calls.append(1) or gather(*a, **k))
        groups = sample_share(*arguments)
        for key, gather in before.items():
            setattr(torch.distributed, key, gather)
        gathers.append((len(calls), all(isinstance(p, DTensor) for p in module.policy.parameters())))
        return groups

    Collector.sample_share = count_gathers
    trainer = make_trainer(name, Path.cwd(), max_steps=4, accumulate_grad_batches=3)
    (validated,) = trainer.validate(module, five, verbose=False)
    trainer.fit(module, RolloutLoader(ROWS, module))
    whole = whole_weights(module)
    local = [local_tensor(p.detach()).clone() for p in module.policy.parameters() if not isinstance(p, DTensor)]
    predicted = trainer.predict(module, five)
    prompts = [row["prompt"] for batch in predicted for row in batch]
    has_identity = module.reference.fingerprint is not None

    class Breaks(L.Callback):
        """A gradient that is not finite, on the last rank alone."""

        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_rank == trainer.world_size - 1:
                local_tensor(next(p.grad for p in module.parameters() if p.grad is not None)).fill_(torch.nan)

    trainer = make_trainer(name, Path.cwd(), max_steps=3, accumulate_grad_batches=3, callbacks=[Breaks()])
    trainer.fit(module, RolloutLoader(ROWS, module))
    return {
        "validated": validated,
        "weights": whole,
        "own": local,
        "prompts": prompts,
        "has_identity": has_identity,
        "skipped": module.run.skipped_updates,
        "gathers": gathers,
    }


def call_unevenly(model: str, name: str) -> dict[str, Any]:
    """Each rank calls the gathered policy as often as it likes, as for completions that are longer on one of them."""
    seen: list[Tensor] = []

    class Calls(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            ids = torch.arange(6)[None] + 3
            with module.placement.gathered():
                seen.extend(module.policy(ids).logits for _ in range(2 + 5 * trainer.global_rank))

    module = make_module(model, "sampled", reward=reward)
    make_trainer(name, Path.cwd(), max_steps=2, callbacks=[Calls()]).fit(module, RolloutLoader(ROWS, module))
    return {"first": seen[0], "equal": torch.equal(seen[0], seen[1]), "last": seen[-1]}


def train_and_resume(model: str, folder: Path, name: str) -> dict[str, Any]:
    """A whole run that saves after each update; the same from the third, fifth and sixth update on."""
    saver = ModelCheckpoint(folder / f"sampled-{name}", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    results = {"whole": train_sampled(model, name, callbacks=[saver], enable_checkpointing=True)}
    for step in (3, 5, 6):
        results[f"from {step}"] = train_sampled(model, name, folder / f"sampled-{name}" / f"step={step}.ckpt")
    return results


def resume_from(model: str, folder: Path, name: str, other: str) -> dict[str, Any]:
    """What comes of the checkpoints of another strategy, between two rollouts and within one."""
    result = train_sampled(model, name, folder / f"sampled-{other}" / "step=6.ckpt")
    try:
        train_sampled(model, name, folder / f"sampled-{other}" / "step=5.ckpt")
    except ValueError as error:
        result["refusal"] = str(error)
    return result


def main(model: str, folder: Path, name: str, variants: list[str]) -> None:
    """One file a variant and rank."""
    torch.set_num_threads(1)
    for variant in variants:
        L.seed_everything(0, verbose=False)
        if variant == "sampled":
            result = train_and_resume(model, folder, name)
        elif variant == "uncompiled":
            result = try_to_compile(model, name)
        elif variant == "uneven":
            result = call_unevenly(model, name)
        elif variant == "others":
            result = try_others(model, name)
        elif variant.startswith("from:"):
            result = resume_from(model, folder, name, variant.removeprefix("from:"))
        else:
            torch.compiler.set_default_backend("aot_eager")  # "compiled", without waiting for a C++ compiler
            result = train_recorded(model, folder, name, variant)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        on_cpu = tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, result)
        torch.save(on_cpu, folder / f"{name} {variant} {rank}.pt")
