"""Every feature that is Lightning's own must go on working around GVPOModule."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.parametrize(
    ("accumulate", "limits"),
    [
        (2, {}),
        (3, {}),
        (4, {}),
        (7, {}),  # more than the update's 4 groups: they are cut
        (8, {"micro_batch_size": 2}),  # less than a group
        (5, {"micro_batch_tokens": 60}),
    ],
)
def test_accumulation_and_micro_batch_size_do_not_change_the_training(make_module, fit, weights, accumulate, limits):
    sizes = {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4}
    whole = make_module(optimizer=sgd)
    cut = make_module(optimizer=sgd, rollout=RolloutSettings(**sizes, **limits))
    # in float64, where the order of sums makes no difference that four updates could amplify
    fit(whole, max_steps=4, precision="64-true")
    fit(cut, max_steps=4, accumulate_grad_batches=accumulate, precision="64-true")
    assert cut.microstep == 4 * accumulate
    assert weights(cut).dtype == torch.float64
    torch.testing.assert_close(weights(cut), weights(whole), atol=1e-8, rtol=0)  # the norms are float32's


def test_gradient_checkpointing_does_not_change_the_training(make_module, fit, weights):
    plain, checkpointed = make_module(), make_module(gradient_checkpointing=True)
    for module in (plain, checkpointed):
        fit(module, max_steps=3)
    assert (plain.policy.is_gradient_checkpointing, checkpointed.policy.is_gradient_checkpointing) == (False, True)
    assert torch.equal(weights(plain), weights(checkpointed))


def test_gradient_clipping_bounds_the_step(make_module, fit, weights):
    module = make_module(optimizer=sgd)
    before = weights(module)
    fit(module, max_steps=1, gradient_clip_val=1e-3)
    assert float((weights(module) - before).norm()) == pytest.approx(0.5 * 1e-3, rel=1e-3)


def test_bf16_mixed_precision_stays_close_to_full_precision(make_module, fit, weights):
    # one update on the same samples: later ones sample other completions
    start = weights(make_module())
    steps = []
    for precision in ("32-true", "bf16-mixed"):
        module = make_module(optimizer=sgd)
        fit(module, max_steps=1, precision=precision)
        assert {p.dtype for p in module.policy.parameters()} == {torch.float32}
        steps.append(weights(module) - start)
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) > 0.8


def test_bf16_true_precision_casts_the_policy_and_the_reference_while_it_is_asked(make_module, fit, weights):
    module = make_module()
    start = weights(module)
    fit(module, max_steps=2, precision="bf16-true")
    assert {p.dtype for p in module.policy.parameters()} == {torch.bfloat16}
    assert torch.equal(torch.cat([value.flatten() for value in module.reference.weights.values()]), start)
    with module.reference.applied(module.policy) as model:
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert torch.equal(weights(module), start.bfloat16())


def test_max_steps_counts_updates_and_max_epochs_counts_passes(make_module, fit):
    assert fit(make_module(), max_steps=5, accumulate_grad_batches=2).global_step == 5
    # 24 prompts, 8 a rollout, 2 updates a rollout: 6 updates an epoch
    assert fit(make_module(), max_steps=-1, max_epochs=2).global_step == 12


def test_scheduler_steps_once_an_update(make_module, fit):
    module = make_module(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    trainer = fit(module, max_steps=3, accumulate_grad_batches=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3e-3 / 8)


class CountingCallback(Callback):
    def __init__(self):
        self.batches = self.optimizer_steps = 0

    def on_train_batch_end(self, *args):
        self.batches += 1

    def on_before_optimizer_step(self, *args):
        self.optimizer_steps += 1


def test_callbacks_and_loggers(make_module, fit, tmp_path):
    counter = CountingCallback()
    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        make_module(),
        max_steps=4,
        accumulate_grad_batches=2,
        callbacks=[counter, LearningRateMonitor()],
        logger=logger,
        log_every_n_steps=1,
    )
    assert (counter.batches, counter.optimizer_steps) == (8, 4)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    names = set(header.split(","))
    assert {
        "loss",
        "reward/mean",
        "reward/std",
        "residual/rms",
        "implicit_reward/slope",
        "kl/reference",
        "log_ratio/policy/mean",
        "log_ratio/policy/max",
        "entropy",
        "completion/length_mean",
        "completion/length_min",
        "completion/length_max",
        "completion/truncated_fraction",
        "group/zero_variance_fraction",
        "group/dropped",
        "objective/reward_term",
        "objective/covariance_term",
        "objective/variance_term",
        "time/rollout",
        "time/reward",
        "time/reference",
        "time/train",
        "throughput/tokens_per_second",
        "lr-AdamW",
    } <= names
    assert sum(bool(line.split(",")[header.split(",").index("loss")]) for line in lines) == 4


def test_fast_dev_run(make_module, fit):
    module = make_module()
    assert fit(module, fast_dev_run=True).global_step == 1
    assert fit(make_module(), fast_dev_run=3, accumulate_grad_batches=2).global_step == 2


def test_validation_logs_sampled_rewards(make_module, prompts, tmp_path):
    module = make_module()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, max_steps=2
    )
    loader = torch.utils.data.DataLoader(prompts[:4], batch_size=2)
    trainer.fit(module, RolloutLoader(prompts, module), loader)
    first = trainer.validate(module, loader, verbose=False)[0]
    second = trainer.validate(module, loader, verbose=False)[0]
    assert first == second  # the same weights draw the same samples
    assert 0 <= first["validation/reward/mean"] <= 1.04
    assert trainer.test(module, loader, verbose=False)[0]["test/completion/length_max"] <= 4
    rows = [row for batch in trainer.predict(module, loader) for row in batch]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts[:4]]
    assert all(len(row["completions"]) == len(row["rewards"]) == 4 for row in rows)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(module, RolloutLoader(prompts, module))  # evaluation under inference mode poisons nothing
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("stop", "limit"),
    [
        pytest.param(4, {"max_steps": 16}, id="rollout boundary"),
        pytest.param(3, {"max_steps": 16}, id="within a rollout"),
        pytest.param(6, {"max_steps": 16}, id="end of an epoch, by steps"),
        pytest.param(6, {"max_steps": -1, "max_epochs": 3}, id="end of an epoch, by epochs"),
    ],
)
@pytest.mark.parametrize("reference", ["frozen", "previous"])
def test_resumed_run_is_bitwise_equal(make_module, fit, weights, tmp_path, stop, limit, reference):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"enable_checkpointing": True, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **limit}
    through = make_module(reference=reference)
    total = fit(through, callbacks=[saver], **options).global_step

    torch.manual_seed(99)  # another process has drawn other numbers before
    resumed = make_module(seed=5, reference=reference)  # other weights: all must come from the checkpoint
    trainer = fit(resumed, ckpt_path=tmp_path / f"step={stop}.ckpt", **options)
    assert trainer.global_step == total
    assert torch.equal(weights(resumed), weights(through))
    assert resumed.microstep == through.microstep


@pytest.mark.parametrize(
    ("stop", "change", "message"),
    [
        (4, {"accumulate_grad_batches": 4}, "accumulate_grad_batches"),
        (4, {"prompts_per_rollout": 12}, "prompts_per_rollout"),
        (4, {"temperature": 0.5}, "temperature"),
        (3, {"group_size": 2}, "group_size"),
    ],
)
def test_resume_refuses_settings_that_move_the_position(make_module, fit, tmp_path, stop, change, message):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_module(), max_steps=4, accumulate_grad_batches=2, callbacks=[saver], enable_checkpointing=True)
    accumulate = change.pop("accumulate_grad_batches", 2)
    temperature = change.pop("temperature", 1.0)
    sizes = {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4} | change
    module = make_module(rollout=RolloutSettings(**sizes), temperature=temperature)
    with pytest.raises(ValueError, match=message):
        fit(module, max_steps=8, accumulate_grad_batches=accumulate, ckpt_path=tmp_path / f"step={stop}.ckpt")


def test_resume_refuses_another_reference(make_module, fit, tiny_policy, tokenizer, tmp_path):
    for seed in (0, 1):
        tiny_policy(seed).save_pretrained(tmp_path / f"model{seed}")
        tokenizer.save_pretrained(tmp_path / f"model{seed}")
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(make_module(policy=str(tmp_path / "model0")), max_steps=2, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(ValueError, match="fingerprint"):
        fit(make_module(policy=str(tmp_path / "model1")), max_steps=4, ckpt_path=tmp_path / "step=2.ckpt")


def test_checkpoint_of_a_policy_from_a_folder_holds_no_reference(make_module, fit, tiny_policy, tokenizer, tmp_path):
    tiny_policy().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    module = make_module(policy=str(tmp_path / "model"))
    trainer = fit(module, max_steps=2, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["gvpo"]["reference"]) == {"version", "last_refresh", "fingerprint"}
    assert len(checkpoint["state_dict"]) == len(module.policy.state_dict())


def test_a_bare_dataloader_is_refused_with_the_line_to_write(make_module, prompts):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ValueError, match=r"trainer\.fit\(module, RolloutLoader\(dataloader, module\)\)"):
        trainer.fit(make_module(), torch.utils.data.DataLoader(prompts))


def test_epochs_that_would_cut_an_update_are_refused(make_module, fit):
    with pytest.raises(ValueError, match="limit_train_batches"):
        fit(make_module(), accumulate_grad_batches=2, limit_train_batches=3)


def test_validation_that_would_cut_an_update_is_refused(make_module, prompts, tmp_path):
    module = make_module()
    loader = torch.utils.data.DataLoader(prompts[:4], batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=4,
        accumulate_grad_batches=2,
        val_check_interval=3,
        default_root_dir=tmp_path,
    )
    with pytest.raises(ValueError, match="Validation must not fall within an optimizer update"):
        trainer.fit(module, RolloutLoader(prompts, module), loader)


def test_a_checkpoint_from_within_an_update_is_refused(make_module, fit, tmp_path):
    class SaveWithin(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if module.microstep == 3:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    fit(make_module(), max_steps=2, accumulate_grad_batches=2, callbacks=[SaveWithin()])
    with pytest.raises(ValueError, match="saved within an optimizer update, at micro-batch 3"):
        fit(make_module(), max_steps=4, accumulate_grad_batches=2, ckpt_path=tmp_path / "within.ckpt")


def test_a_checkpoint_of_something_else_is_refused(make_module, fit, tmp_path):
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="not one of a GVPOModule"):
        fit(make_module(), ckpt_path=tmp_path / "other.ckpt")


def test_fit_after_a_trial_or_with_another_accumulation_starts_with_a_rollout_of_its_own(make_module, fit):
    module = make_module()
    fit(module, fast_dev_run=3, accumulate_grad_batches=2)  # stops within the second update
    assert module.microstep == 3
    assert fit(module, max_steps=3, accumulate_grad_batches=2).global_step == 3
    assert module.microstep == 4 + 6  # two updates of two micro-batches are a rollout
    assert fit(module, max_steps=2, accumulate_grad_batches=3).global_step == 2
    assert module.microstep == 3 * 6 + 6


def test_limited_epochs_are_all_of_one_length(make_module, prompts, tmp_path):
    module, lengths = make_module(), []

    class Lengths(Callback):
        def on_train_epoch_end(self, trainer, module):
            lengths.append(trainer.fit_loop.epoch_loop.batch_progress.current.completed)

    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=4,
        limit_train_batches=4,
        callbacks=[Lengths()],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, RolloutLoader(prompts, module))  # 6 micro-batches in a whole epoch
    assert lengths == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overfit_batches": 2}, "overfit_batches=2"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
        ({"callbacks": [LearningRateFinder()]}, "LearningRateFinder"),
        ({"callbacks": [BatchSizeFinder()]}, "BatchSizeFinder"),
    ],
)
def test_what_rollouts_can_not_be_trained_with_is_refused(make_module, fit, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(make_module(), **arguments)


@pytest.mark.parametrize(
    ("search", "message"), [("lr_find", "LearningRateFinder"), ("scale_batch_size", "BatchSizeFinder")]
)
def test_the_tuner_is_refused_by_name(make_module, prompts, search, message):
    module, trainer = make_module(), L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=2)
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(Tuner(trainer), search)(module, RolloutLoader(prompts, module))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 3}, "with top_k=3 never"),
        ({"top_p": 0.5, "min_p": 0.1}, r"with top_p=0\.5 and min_p=0\.1 never"),
        ({"temperature": 0.0}, r"with temperature=0\.0 never"),
    ],
)
def test_truncated_sampling_is_warned_of(make_module, fit, settings, named):
    with pytest.warns(UserWarning, match=named):
        fit(make_module(generation=GenerationSettings(max_new_tokens=4, **settings)), max_steps=1)


def test_micro_batch_size_that_can_not_hold_is_refused_before_training(make_module, fit):
    settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=8)
    module = make_module(rollout=settings)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2"):
        fit(module)
    fit(module, accumulate_grad_batches=2, max_steps=2)


def test_micro_batch_size_below_a_group_is_refused_only_where_an_update_does_not_fit(make_module, fit):
    settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=3)
    module = make_module(rollout=settings)
    with pytest.raises(ValueError, match="accumulate_grad_batches=6"):
        fit(module, accumulate_grad_batches=5)
    fit(module, accumulate_grad_batches=6, max_steps=2)
    assert all(update.is_cut for update in module.updates)
    assert max(len(rows) for update in module.updates for rows in update.micro_batches) <= 3
