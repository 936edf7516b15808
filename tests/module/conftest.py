import lightning as L
import pytest
import torch

from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


def digit_reward(prompts, completions, **columns):
    """Varied and deterministic: the share of digits that are above 4, plus a little for length."""
    return [sum(c in "56789" for c in text) / 4 + 0.01 * len(text) for text in completions]


@pytest.fixture
def prompts():
    """24 rows with ragged prompts."""
    return [{"prompt": f"{n}+{n % 7}=", "answer": str(n + n % 7)} for n in range(24)]


@pytest.fixture
def make_module(tiny_policy, tokenizer):
    """Builds a small GVPOModule around a random model; keyword arguments replace its settings."""

    def build(seed: int = 0, policy=None, **settings) -> GVPOModule:
        arguments = {
            "reward": digit_reward,
            "tokenizer": tokenizer,
            "beta": 0.5,
            "rollout": RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4),
            "generation": GenerationSettings(max_new_tokens=4),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        }
        return GVPOModule(policy or tiny_policy(seed), **(arguments | settings))

    return build


@pytest.fixture
def fit(prompts, tmp_path):
    """Fits a module with a quiet CPU Trainer; keyword arguments go to the Trainer."""

    def run(module, *, rows=None, val_dataloaders=None, ckpt_path=None, **trainer_arguments) -> L.Trainer:
        arguments = {
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "max_steps": 8,
        }
        trainer = L.Trainer(**(arguments | trainer_arguments))
        trainer.fit(module, RolloutLoader(rows or prompts, module), val_dataloaders, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def weights():
    """The policy's parameters, flattened and copied."""

    def flatten(module) -> torch.Tensor:
        return torch.cat([p.detach().flatten().clone() for p in module.policy.parameters()])

    return flatten
