"""A frozen reference is the policy as its folder holds it, whatever was done with the module before."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from gvpo_lightning.module import GVPOModule
from gvpo_lightning.reference.settings import ReferenceSettings
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings
from tests.conftest import digit_reward

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}  # so that the adapter is no zero


@pytest.fixture
def make(make_module, tiny_policy, tokenizer, tmp_path):
    """Builds modules whose policy lies in one folder."""
    tiny_policy(3).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    return lambda **settings: make_module(policy=str(tmp_path / "policy"), tokenizer=None, **settings)


@pytest.fixture
def checkpoint(make, fit, tmp_path):
    """Of a run that has trained the policy within a rollout."""

    def save(**settings):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(make(**settings), max_steps=3, callbacks=[saver], enable_checkpointing=True)
        return tmp_path / "step=3.ckpt"

    return save


def evaluate(module, stage, path, precision="32-true"):
    trainer = L.Trainer(accelerator="cpu", barebones=True, precision=precision)
    prompts = DataLoader([{"prompt": f"{n}+1=", "answer": "1"} for n in range(4)], collate_fn=list)
    getattr(trainer, stage)(module, prompts, ckpt_path=path)


def assert_is_original(module, make, **settings):
    """The weights that the reference has, and the policy's when it was new, are the same bits."""
    fresh = make(**settings)
    fresh.configure_model()
    with module.reference.applied(module.policy) as model:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert all(torch.equal(found[name], p.to(found[name].dtype)) for name, p in fresh.policy.named_parameters())


BEFORE = ["validate", "test", "predict", "load_from_checkpoint", "configure_model"]


@pytest.mark.parametrize(
    ("before", "lora"),
    [
        *(pytest.param(before, None, id=before) for before in BEFORE),
        pytest.param("validate", LORA, id="validate, lora"),
        *(pytest.param(before, LORA, id=f"{before}, lora", marks=pytest.mark.slow) for before in BEFORE[1:]),
    ],
)
def test_the_reference_is_the_folders_whatever_was_loaded(make, checkpoint, fit, tokenizer, tmp_path, before, lora):
    path = checkpoint(lora=lora)
    if before == "load_from_checkpoint":
        module = GVPOModule.load_from_checkpoint(
            path,
            policy=str(tmp_path / "policy"),
            lora=lora,
            reward=digit_reward,
            rollout=RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4),
            generation=GenerationSettings(max_new_tokens=4),
        )
    else:
        module = make(lora=lora)
        module.configure_model() if before == "configure_model" else evaluate(module, before, path)
    fit(module, max_steps=1)
    assert_is_original(module, make, lora=lora)


@pytest.mark.parametrize(
    ("before", "precision"),
    [
        ("bf16-true", "32-true"),
        ("32-true", "bf16-true"),
        *(pytest.param(None, precision, marks=pytest.mark.slow) for precision in ("32-true", "bf16-true")),
        *(pytest.param(same, same, marks=pytest.mark.slow) for same in ("32-true", "bf16-true")),
    ],
)
def test_an_identity_is_that_of_what_was_loaded(make, checkpoint, fit, before, precision):
    """`validate(X)` then `fit(ckpt_path=X)` goes on, whatever the precisions; so does a run in another precision."""
    path, module = checkpoint(), make()
    if before is not None:
        evaluate(module, "validate", path, before)
    trainer = fit(module, max_steps=4, ckpt_path=path, precision=precision)
    assert trainer.global_step == 4
    assert_is_original(module, make)


def test_another_folders_policy_is_refused_after_a_validation_too(make, checkpoint, fit, tiny_policy, tmp_path):
    path = checkpoint()
    tiny_policy(4).save_pretrained(tmp_path / "policy")
    module = make()
    evaluate(module, "validate", path)
    with pytest.raises(ValueError, match="The reference is not the one that this checkpoint was trained against"):
        fit(module, max_steps=4, ckpt_path=path)


def test_references_that_move_start_from_the_policy_as_training_finds_it(make, checkpoint, fit):
    path, kind = checkpoint(), ReferenceSettings("every_n_steps", every_n_steps=100)
    module = make(reference=kind)
    evaluate(module, "validate", path)
    found = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    fit(module, max_steps=2)
    assert all(torch.equal(module.reference.weights[name], value) for name, value in found.items())
