"""What may be given as optimizer and scheduler, and when the scheduler is stepped."""

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchPlateau
from torch.optim.lr_scheduler import SequentialLR, StepLR

from gvpo_lightning.rollout.loader import RolloutLoader

REWARD = "validation/reward/mean"


def plateau(**settings):
    arguments = {"monitor": REWARD, "mode": "max", "patience": 0, "factor": 0.5, "cooldown": 1} | settings
    return lambda optimizer: ReduceLROnPlateau(optimizer, **arguments)


class Watch(L.Callback):
    """The lr of every update, and the metric of every validation, by the updates before it."""

    def __init__(self, monitor=REWARD):
        self.monitor, self.rates, self.metrics = monitor, {}, {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates[trainer.global_step] = optimizer.param_groups[0]["lr"]

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.metrics[trainer.global_step] = float(trainer.callback_metrics[self.monitor])


@pytest.fixture
def loader(prompts):
    return torch.utils.data.DataLoader(prompts[:4], batch_size=2)


EPOCHS = {"max_steps": -1, "max_epochs": 2}  # of 6 updates each
INTERVALS = {
    "each epoch": ({}, [6, 12]),
    "across epochs": ({"val_check_interval": 5, "check_val_every_n_epoch": None}, [5, 10]),
    "every other epoch": ({"check_val_every_n_epoch": 2, "val_check_interval": 0.5}, [9, 12]),
    "accumulated": ({"accumulate_grad_batches": 2, "val_check_interval": 6}, [3, 6, 9, 12]),
}


@pytest.mark.parametrize(("options", "validations"), INTERVALS.values(), ids=INTERVALS.keys())
def test_a_plateau_is_looked_for_once_a_validation(make_module, fit, loader, options, validations):
    watch = Watch()
    fit(make_module(lr_scheduler=plateau()), val_dataloaders=loader, callbacks=[watch], **EPOCHS, **options)
    assert list(watch.metrics) == validations
    # torch's own, with the metrics that were logged
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = TorchPlateau(optimizer, mode="max", patience=0, factor=0.5, cooldown=1)
    expected = {}
    for step in range(12):
        if step in watch.metrics:
            scheduler.step(watch.metrics[step])
        expected[step] = optimizer.param_groups[0]["lr"]
    assert watch.rates == expected


def test_a_plateau_of_a_training_metric_is_looked_for_at_validations(make_module, fit, loader):
    watch = Watch("reward/mean")
    module = make_module(lr_scheduler=plateau(monitor="reward/mean"))
    trainer = fit(module, val_dataloaders=loader, callbacks=[watch], val_check_interval=2, max_steps=6)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert trainer.lr_scheduler_configs[0].scheduler.best == pytest.approx(max(watch.metrics.values()))


def test_a_validation_without_news_steps_nothing(make_module, fit, loader):
    def silent_in_validation(prompts, completions, **columns):
        return [None if prompt in {f"{n}+{n}=" for n in range(4)} else float(len(prompt)) for prompt in prompts]

    module = make_module(reward=silent_in_validation, lr_scheduler=plateau())
    trainer = fit(module, val_dataloaders=loader, val_check_interval=2, max_steps=4)
    assert REWARD not in trainer.callback_metrics
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 0


class SaveAt(L.Callback):
    """At the end of the update, the validation and the epoch at these steps."""

    def __init__(self, folder, *steps):
        self.folder, self.steps = folder, steps

    def _save(self, trainer, name):
        if trainer.global_step in self.steps and not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{name}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "update")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


def test_a_resumed_run_looks_on_where_it_was(make_module, fit, loader, weights, tmp_path):
    options = {"val_dataloaders": loader, "val_check_interval": 2, "max_steps": 8}
    through, watch = make_module(lr_scheduler=plateau()), Watch()
    state = fit(through, callbacks=[watch, SaveAt(tmp_path, 4, 6)], **options).lr_scheduler_configs[0].scheduler
    saved = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    assert saved == ["epoch-6", "update-4", "update-6", "validation-4", "validation-6"]
    for name in saved:
        kind, step = name.split("-")
        resumed, again = make_module(seed=3, lr_scheduler=plateau()), Watch()
        trainer = fit(resumed, callbacks=[again], ckpt_path=tmp_path / f"{name}.ckpt", **options)
        # the validation that follows the update is not passed over
        first = int(step) if kind == "update" else int(step) + 1
        assert again.metrics == {at: value for at, value in watch.metrics.items() if at >= first}
        assert trainer.lr_scheduler_configs[0].scheduler.state_dict() == state.state_dict()
        assert torch.equal(weights(resumed), weights(through))


def other_than_given(optimizer):
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return StepLR(other, 1)


REFUSED_SCHEDULERS = {
    "a name that is not logged": (plateau(monitor="validation/rewards"), f"not logged: set its monitor .*{REWARD}"),
    "no name": (TorchPlateau, "does not say with which: use lightning.pytorch.cli.ReduceLROnPlateau"),
    "Lightning's dict": (lambda optimizer: {"scheduler": StepLR(optimizer, 1), "interval": "epoch"}, "got dict"),
    "a plateau in a row": (
        lambda optimizer: SequentialLR(optimizer, [StepLR(optimizer, 1), TorchPlateau(optimizer)], [1]),
        "does not support `ReduceLROnPlateau`",
    ),
    "another's": (other_than_given, "attached with an optimizer that wasn't returned"),
}


@pytest.mark.parametrize(("scheduler", "message"), REFUSED_SCHEDULERS.values(), ids=REFUSED_SCHEDULERS.keys())
def test_schedulers_that_can_not_be_stepped_are_refused(make_module, fit, loader, scheduler, message):
    watch = Watch()
    with pytest.raises(Exception, match=message) as error:
        fit(make_module(lr_scheduler=scheduler), val_dataloaders=loader, callbacks=[watch])
    assert "\n" not in str(error.value)
    assert not watch.rates


def test_a_plateau_without_validations_is_refused(make_module, fit, loader):
    with pytest.raises(ValueError, match="this fit has none: give it prompts to validate on"):
        fit(make_module(lr_scheduler=plateau()))
    with pytest.raises(ValueError, match="this fit has none: give it prompts to validate on"):
        fit(make_module(lr_scheduler=plateau()), val_dataloaders=loader, limit_val_batches=0)


def test_a_training_metric_that_is_never_logged_ends_the_run_at_the_first_validation(make_module, fit, loader):
    module, watch = make_module(lr_scheduler=plateau(monitor="rewards/mean")), Watch()
    with pytest.raises(ValueError, match=r"'rewards/mean', which is not logged: set its monitor .*reward/mean"):
        fit(module, val_dataloaders=loader, callbacks=[watch], val_check_interval=2)
    assert list(watch.rates) == [0, 1]


def adamw(parameters, **settings):
    return torch.optim.AdamW(parameters, lr=1e-3, **settings)


REFUSED_OPTIMIZERS = {
    "LBFGS": (torch.optim.LBFGS, "LBFGS can't train a rollout's updates: its step needs closure"),
    "SparseAdam": (torch.optim.SparseAdam, "takes sparse gradients only"),
    "some parameters": (lambda parameters: adamw(parameters[3:]), "3 of the policy's 27 are missing"),
    "several": (lambda parameters: [adamw(parameters)], "must give one torch.optim.Optimizer, got list"),
    "capturable": (lambda parameters: adamw(parameters, capturable=True), "capturable=True does not run on a CPU"),
}


@pytest.mark.parametrize(("optimizer", "message"), REFUSED_OPTIMIZERS.values(), ids=REFUSED_OPTIMIZERS.keys())
def test_optimizers_that_can_not_make_the_update_are_refused(make_module, fit, optimizer, message):
    with pytest.raises(ValueError, match=message):
        fit(make_module(optimizer=optimizer))


def test_a_fused_optimizer_that_lightning_would_not_clip_is_refused_at_the_start(make_module, fit):
    module = make_module(optimizer=lambda parameters: adamw(parameters, fused=True))
    with pytest.raises(ValueError, match=r"can't be clipped under trainer.precision=bf16-mixed: leave fused out"):
        fit(module, precision="bf16-mixed", gradient_clip_val=1.0)
    assert fit(module, precision="bf16-mixed", max_steps=1).global_step == 1


def test_a_policy_that_is_all_frozen_is_refused(make_module, fit, tiny_policy):
    with pytest.raises(ValueError, match="no trainable parameters"):
        fit(make_module(policy=tiny_policy().requires_grad_(False)))


def by_size(parameters):
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]
    return torch.optim.AdamW([groups[0], groups[1] | {"weight_decay": 0.0}], lr=1e-3)


def relative(parameters):
    return transformers.Adafactor(parameters, lr=None, relative_step=True, warmup_init=True)


@pytest.mark.parametrize(
    "optimizer",
    [pytest.param(by_size, id="groups"), pytest.param(relative, id="no lr of its own", marks=pytest.mark.slow)],
)
def test_optimizers_that_are_told_more_or_less_train_and_resume(make_module, fit, weights, tmp_path, optimizer):
    through = make_module(optimizer=optimizer)
    fit(through, max_steps=2, callbacks=[SaveAt(tmp_path, 1)])
    resumed = make_module(seed=3, optimizer=optimizer)
    fit(resumed, max_steps=2, ckpt_path=tmp_path / "update-1.ckpt")
    assert torch.equal(weights(resumed), weights(through))


def test_no_scheduler_changes_an_lr_that_the_optimizer_finds_itself(make_module, fit):
    with pytest.raises(ValueError, match="Adafactor with lr=None finds its learning rate itself"):
        fit(make_module(optimizer=relative, lr_scheduler=lambda optimizer: StepLR(optimizer, 1)))


class Outer(L.LightningModule):
    """Holds a GVPOModule, and may hand on what Lightning calls."""

    def __init__(self, inner, handed_on=()):
        super().__init__()
        self.inner, self.handed_on = inner, handed_on
        self.own = torch.nn.Parameter(torch.ones(2))

    def configure_optimizers(self):
        if "configure_optimizers" in self.handed_on:
            return self.inner.configure_optimizers()
        return torch.optim.SGD([self.own], lr=0.1)

    def validation_step(self, batch, batch_idx):
        return self.inner.validation_step(batch, batch_idx)

    def training_step(self, batch, batch_idx):
        if "training_step" in self.handed_on:
            return self.inner.training_step(batch, batch_idx)
        return self.own.square().sum()


@pytest.fixture
def outer_trainer(tmp_path):
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(**settings, max_steps=2, enable_model_summary=False, default_root_dir=tmp_path)


@pytest.mark.parametrize("handed_on", ["configure_optimizers", "training_step"])
def test_a_module_inside_another_is_not_trained_through_it(make_module, prompts, outer_trainer, handed_on):
    outer = Outer(make_module(), [handed_on])
    with pytest.raises(
        ValueError, match=r"inside another LightningModule can't be trained or validated through it.*subclass"
    ):
        outer_trainer.fit(outer, RolloutLoader(prompts, outer.inner))
    with pytest.raises(ValueError, match="can't be trained or validated through it"):
        outer_trainer.validate(outer, torch.utils.data.DataLoader(prompts[:1]), verbose=False)


def test_a_module_inside_another_is_held_saved_exported_and_fitted_by_itself(
    make_module, fit, weights, outer_trainer, tmp_path, arithmetic
):
    class Loading(Outer):
        def configure_model(self):
            self.inner.configure_model()

    outer = Loading(make_module(policy=str(arithmetic / "model")))
    outer_trainer.fit(outer, torch.utils.data.DataLoader([0, 1]))
    outer_trainer.save_checkpoint(tmp_path / "outer.ckpt")
    other = Outer(make_module(policy=str(arithmetic / "model")))
    other.inner.configure_model()
    with torch.no_grad():
        next(other.inner.policy.parameters()).zero_()
    other.load_state_dict(torch.load(tmp_path / "outer.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(weights(other.inner), weights(outer.inner))
    outer.inner.export(tmp_path / "export")
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert fit(outer.inner, max_steps=1).global_step == 1
