"""The configs that a person would start from train tiny models of the same architectures on real problems."""

import pytest
import torch
import yaml
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gvpo_lightning.cli import main

RUNS = {  # the layers of each, as its first lines name them
    "qwen2.5_0.5b_gsm8k.yaml": ["bases/gpu.yaml", "bases/gsm8k.yaml"],
    "qwen2.5_math_1.5b_lora.yaml": ["bases/gpu.yaml", "bases/math.yaml"],
    "qwen2.5_math_7b_paper.yaml": ["bases/gpu.yaml", "bases/math.yaml", "strategy/fsdp2.yaml"],
    "llama3.2_1b_chat.yaml": ["bases/gpu.yaml"],
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def save_tiny(root, folder, architecture, **settings):
    """A random model of few parameters with the tokenizer, and the chat template, of the shipped GSM8K policy."""
    tokenizer = AutoTokenizer.from_pretrained(root / "configs" / "gsm8k_tiny" / "model")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    config = LlamaConfig if architecture is not Qwen2ForCausalLM else Qwen2Config
    architecture(config(vocab_size=len(tokenizer), **(SIZES | ends | settings))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small(run, data, folder, root):
    """What replaces the run's sizes, hub ids and GPUs; everything else stays as it is."""
    problems = data / "gsm_8k"
    overlay = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(folder / "run"),
            "max_steps": 2,
            "accumulate_grad_batches": 2,
            "limit_val_batches": 1,
            "val_check_interval": 1.0,
            "enable_progress_bar": False,
        },
        "data": {
            "path": str(problems),
            "name": None,
            "prompt_column": "problem",
            "train_split": "train[:4]",
            "validation_split": "train[7473:7475]",
            "test_split": None,
        },
        "model": {
            "policy": save_tiny(root, folder / "policy", Qwen2ForCausalLM, tie_word_embeddings="7b" not in run),
            "rollout": {"prompts_per_rollout": 4, "prompts_per_update": 2},
            "generation": {"max_new_tokens": 8},
        },
    }
    if "math" in run:
        overlay["model"]["reward"] = {
            "class_path": "gvpo_lightning.rewards.BoxedMath",
            "init_args": {"answer_column": "answer"},
        }
    if "7b" in run:
        overlay["trainer"]["strategy"] = {
            "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
            "init_args": {"data_parallel_size": 1, "tensor_parallel_size": 1},
        }
    if "chat" in run:
        overlay["data"]["conversational"] = True
        overlay["model"]["policy"] = save_tiny(root, folder / "chat", LlamaForCausalLM, tie_word_embeddings=True)
        rewards = yaml.safe_load((root / "configs" / run).read_text())["model"]["reward"]
        judge = save_tiny(root, folder / "judge", LlamaForSequenceClassification, num_labels=1)
        rewards[0]["init_args"]["path"] = judge
        overlay["model"]["reward"] = rewards
    (folder / "small.yaml").write_text(yaml.safe_dump(overlay))
    return folder / "small.yaml"


@pytest.mark.parametrize("run", RUNS)
def test_run_trains_two_steps_on_real_problems(run, root, shared_data, tmp_path):
    layers = [root / "configs" / layer for layer in [*RUNS[run], run]]
    layers.append(small(run, shared_data, tmp_path, root))
    main(["fit", *(word for layer in layers for word in ("--config", str(layer)))])
    header, *lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    steps = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    losses = [float(step["loss"]) for step in steps if step["loss"]]
    assert len(losses) == 2
    assert all(loss == loss and loss < 1e3 for loss in losses)


@pytest.mark.parametrize("run", RUNS)
def test_run_says_how_it_is_started(run, root):
    text = (root / "configs" / run).read_text()
    assert len(text.splitlines()) <= 40
    command = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#"))
    for layer in [*RUNS[run], run]:
        assert f"--config configs/{layer}" in command
        assert (root / "configs" / layer).exists()
