import os

# before transformers, datasets and triton are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels of tests/kernels; `auto` never interprets

from pathlib import Path

import lightning as L
import pytest
from hypothesis import HealthCheck, settings
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings
# examples may take as long as a busy machine makes them; a fixture is the same for all of a test's
# and the examples are the same in every run, whatever another run has left in a folder
settings.register_profile(
    "untimed",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("untimed")
ROOT = Path(__file__).parent.parent
# A Trainer that launches ranks leaves them in its process, where the next launcher would wait for ranks of others.
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DATA = Path(os.environ["GVPO_DATA"]).resolve() if os.environ.get("GVPO_DATA") else None  # tests have other folders


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Nothing that a test writes lands in the repository; no seed and no rank leaks from one test to the next."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    yield
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def rewards_in_process(monkeypatch):
    """Tests' rewards look at tests' variables; a module that overrides this has the workers that users have."""
    monkeypatch.setattr("gvpo_lightning.rewards.run.default_num_workers", lambda ranks_here: 0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def arithmetic() -> Path:
    """The shipped arithmetic task: `model/` and `sums/`."""
    return ROOT / "configs" / "arithmetic"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real datasets that the environment names; where it names none, its tests skip."""
    if DATA is None:
        pytest.skip("set GVPO_DATA to a folder with the datasets evaluation_suite/ and gsm_8k/")
    for name in ("evaluation_suite", "gsm_8k"):
        assert (DATA / name).is_dir(), f"GVPO_DATA={DATA} has no folder {name}"
    return DATA


@pytest.fixture(scope="session")
def tokenizer(arithmetic) -> PreTrainedTokenizerBase:
    """The character tokenizer: `<pad>` 0, `<eos>` 1, digits, + and =."""
    from gvpo_lightning.policy.prepare import load_tokenizer

    return load_tokenizer(str(arithmetic / "model"))


@pytest.fixture
def tiny_policy(tokenizer):
    """Builds a random two-layer Qwen2 for the character tokenizer; keyword arguments go to its config."""

    def build(seed: int = 0, **overrides) -> Qwen2ForCausalLM:
        torch.manual_seed(seed)
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        return Qwen2ForCausalLM(Qwen2Config(**(settings | overrides)))

    return build


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
