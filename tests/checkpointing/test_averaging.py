"""Lightning's weight averaging around a policy: what it averages, what it refuses, and that it resumes."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.checks.callbacks import check_callbacks
from gvpo_lightning.policy.prepare import load_policy
from tests.export.exporting import export

DECAY = 0.5
LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture
def build(make_module, arithmetic):
    """A module with its policy by object, by folder, or by folder with a new adapter."""

    def make(how: str, seed: int = 0, **settings):
        if how == "object":
            return make_module(seed, **settings)
        return make_module(policy=str(arithmetic / "model"), lora=LORA if how == "adapter" else None, **settings)

    return make


class Watch(L.Callback):
    """The policy's trained weights after every update, at every epoch's start and in every validation."""

    def __init__(self):
        self.updates, self.starts, self.validated = [], [], []

    def note(self, module):
        return torch.cat([p.detach().flatten().clone() for p in module.policy.parameters() if p.requires_grad])

    def on_train_start(self, trainer, module):
        self.updates.append(self.note(module))

    def on_train_epoch_start(self, trainer, module):
        self.starts.append(self.note(module))

    def on_train_batch_end(self, trainer, module, *_):
        self.updates.append(self.note(module))

    def on_validation_batch_start(self, trainer, module, *_):
        self.validated.append(self.note(module))


@pytest.mark.parametrize("how", ["object", pytest.param("folder", marks=pytest.mark.slow), "adapter"])
def test_a_run_with_averaged_weights_resumes_bitwise_validates_and_exports_them(
    build, fit, weights, prompts, tmp_path, how
):
    data = torch.utils.data.DataLoader(prompts[:2], batch_size=2)
    options = {"max_steps": 6, "val_check_interval": 2, "num_sanity_val_steps": 0, "val_dataloaders": data}

    def run(module, name, **settings):
        saver = RunCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        watch = Watch()
        callbacks = [EMAWeightAveraging(decay=DECAY), watch, saver]
        fit(module, callbacks=callbacks, enable_checkpointing=True, **options, **settings)
        return watch

    through = build(how)
    watch = run(through, "a")
    average, averages = watch.updates[1], []  # the first update begins it
    for after in watch.updates[2:]:
        average = DECAY * average + (1 - DECAY) * after
        averages.append(average)
    torch.testing.assert_close(watch.validated[1], averages[2], rtol=1e-6, atol=1e-7)
    assert not torch.equal(watch.validated[1], watch.updates[4])
    torch.testing.assert_close(watch.note(through), averages[-1], rtol=1e-6, atol=1e-7)
    if how != "adapter":  # without it the reference is the policy as well
        reference = torch.cat([value.flatten() for value in through.reference.weights.values()])
        assert torch.equal(reference, watch.updates[0])  # neither the policy of now nor an average

    torch.manual_seed(99)
    resumed = build(how, seed=5)
    again = run(resumed, "b", ckpt_path=tmp_path / "a" / "step=3.ckpt")
    assert torch.equal(weights(resumed), weights(through))
    assert all(torch.equal(a, b) for a, b in zip(again.validated, watch.validated[1:], strict=True))
    if how != "object":
        folder = export(through, tmp_path / "a" / "step=6.ckpt", tmp_path / "policy")
        exported = load_policy(str(folder))
        assert torch.equal(torch.cat([p.detach().flatten() for p in exported.parameters()]), weights(through))


def test_stochastic_weight_averaging_averages_a_policy_that_is_given_as_an_object(build, fit, weights, tmp_path):
    def averaging():
        return StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)

    options = {"max_steps": -1, "max_epochs": 3}
    through, watch, saver = build("object"), Watch(), RunCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(through, callbacks=[watch, averaging(), saver], enable_checkpointing=True, **options)
    torch.testing.assert_close(weights(through), torch.stack(watch.starts).mean(0), rtol=1e-6, atol=1e-7)
    resumed = build("object", seed=5)
    fit(resumed, callbacks=[averaging()], ckpt_path=tmp_path / "step=12.ckpt", **options)
    assert torch.equal(weights(resumed), weights(through))


class OwnAveraging(StochasticWeightAveraging):
    pass


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.policy.model.embed_tokens)

    def finetune_function(self, module, epoch, optimizer):
        pass


@pytest.mark.parametrize(
    ("callback", "how", "message"),
    [
        (StochasticWeightAveraging(1e-3), "folder", "StochasticWeightAveraging copies the policy before .* EMAWeightA"),
        (OwnAveraging(1e-3), "adapter", "OwnAveraging copies the policy before one given by name is loaded"),
        (Unfreezing(), "folder", "Unfreezing unfreezes weights in the middle of a run"),
        (Unfreezing(), "object", "Unfreezing unfreezes weights in the middle of a run"),
        (BackboneFinetuning(), "object", "BackboneFinetuning unfreezes weights"),
        (ModelPruning("l1_unstructured"), "folder", "ModelPruning renames the weights"),
        (ModelPruning("l1_unstructured"), "object", "ModelPruning renames the weights"),
    ],
)
def test_callbacks_that_can_not_work_are_refused_by_name(build, fit, callback, how, message):
    with pytest.raises(ValueError, match=message) as refused:
        fit(build(how), callbacks=[callback])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("callback", [EMAWeightAveraging(), StochasticWeightAveraging(1e-3)])
def test_averages_of_sharded_weights_are_refused(callback):
    with pytest.raises(ValueError, match="can't average weights of which ranks hold parts"):
        check_callbacks([callback], ModelParallelStrategy(), is_loaded=True)
    check_callbacks([callback], DDPStrategy(), is_loaded=True)
