"""Where a fit begins and a resumed run goes on: epochs of other lengths, loads outside of `fit`, other seeds."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from gvpo_lightning.callbacks import RunCheckpoint, RunSummary
from gvpo_lightning.module import GVPOModule
from gvpo_lightning.rollout.loader import RolloutLoader
from gvpo_lightning.rollout.settings import GenerationSettings, RolloutSettings

MORE_COUNTS = (40, 24, 24), (25, 26)
ONE_UPDATE = RolloutSettings(group_size=4, prompts_per_rollout=4, prompts_per_update=4)
TWO_UPDATES = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4)


def rows(count, first=0):
    return [{"prompt": f"{n}+{n % 7}=", "number": n} for n in range(first, first + count)]


class Seen(Callback):
    """Notes where each update began, and the prompts of each rollout."""

    def __init__(self):
        self.updates, self.rollouts, self.epochs, self.batches = [], [], [], []

    def on_train_epoch_start(self, trainer, module):
        self.epochs.append(module.microstep)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.updates.append((batch["rollout"], batch["slot"]))
        self.batches.append((trainer.current_epoch, batch_idx))
        if batch["rows"] is not None:
            self.rollouts.append([row["number"] for row in batch["rows"]])

    @property
    def prompts(self):
        return [number for rollout in self.rollouts for number in rollout]


@pytest.fixture
def run(make_module, fit):
    """Fits a module on so many rows, and gives what it saw."""

    def fit_on(module, count, **options):
        seen = Seen()
        callbacks = [seen, *options.pop("callbacks", [])]
        fit(module, rows=rows(count), callbacks=callbacks, **({"max_steps": -1, "max_epochs": 1} | options))
        return seen

    return fit_on


@pytest.fixture
def saved_at(make_module, run, tmp_path):
    """The checkpoint after so many updates of a run over 24 prompts, and the prompts that it has seen by then."""

    def save(step, *, rollout=ONE_UPDATE, **settings):
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        module = make_module(rollout=rollout, **settings)
        seen = run(module, 24, max_epochs=-1, max_steps=step, callbacks=[saver], enable_checkpointing=True)
        return tmp_path / "saved" / f"step={step}.ckpt", seen.prompts

    return save


@pytest.mark.parametrize("counts", [(24, 40), (3, 24), *(pytest.param(c, marks=pytest.mark.slow) for c in MORE_COUNTS)])
def test_every_fit_is_an_epoch_of_its_own_data(make_module, run, counts):
    module = make_module(rollout=ONE_UPDATE)
    for count in counts:
        seen = run(module, count)
        assert len(seen.updates) == max(1, count // 4)
        assert len(set(seen.prompts)) == min(4 * len(seen.updates), count)  # none twice before all have come


@pytest.mark.parametrize("stop", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_fit_after_one_that_was_stopped_starts_anew(make_module, run, stop):
    """Nothing of the other data's rollout is trained, and every prompt comes once."""
    module = make_module(rollout=TWO_UPDATES)
    run(module, 24, max_steps=stop)
    seen = run(module, 40)
    assert len(seen.updates) == 10
    assert seen.updates[0][1] == 0
    assert sorted(seen.prompts) == list(range(40))


def test_reloaded_data_may_have_another_length_each_epoch(make_module):
    module, counts, seen = make_module(rollout=ONE_UPDATE), iter([16, 24, 40]), Seen()

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return RolloutLoader(rows(next(counts)), module)

    trainer = L.Trainer(
        accelerator="cpu",
        barebones=True,
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[seen],
    )
    trainer.fit(module, datamodule=Data())
    assert seen.epochs == [0, 4, 10]
    assert trainer.global_step == 20
    epochs = seen.prompts[:16], seen.prompts[16:40], seen.prompts[40:]
    assert [sorted(numbers) for numbers in epochs] == [list(range(16)), list(range(24)), list(range(40))]


@pytest.mark.parametrize(
    ("stop", "count"),
    [(3, 40), (6, 25), (6, 16), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 16), (3, 25), (6, 40)])],
)
def test_a_whole_epoch_follows_on_other_data(make_module, run, saved_at, stop, count):
    """Within an epoch and at its end; 25 prompts make as many rollouts as 24 do."""
    path, _ = saved_at(stop)
    seen = run(make_module(rollout=ONE_UPDATE), count, ckpt_path=path, max_epochs=2)
    length, epochs = count // 4, 2 if stop < 6 else 1  # where the first one was cut, it counts from its beginning
    assert len(seen.updates) == epochs * length
    for number in range(epochs):
        of_epoch = seen.rollouts[number * length : (number + 1) * length]
        assert len({prompt for rollout in of_epoch for prompt in rollout}) >= 4 * length - count % 4 * number


@pytest.mark.parametrize("when", ["on_train_epoch_end", "on_validation_end"])
def test_a_whole_epoch_follows_a_checkpoint_of_an_epochs_end(make_module, run, tmp_path, when):
    options = {"callbacks": [], "enable_checkpointing": True, "val_dataloaders": DataLoader(rows(4), collate_fn=list)}
    saver = ModelCheckpoint(tmp_path, filename="a", save_on_train_epoch_end=when == "on_train_epoch_end")
    run(make_module(rollout=ONE_UPDATE), 24, **options | {"callbacks": [saver]})
    options.pop("callbacks")
    seen = run(make_module(rollout=ONE_UPDATE), 40, ckpt_path=tmp_path / "a.ckpt", max_epochs=2, **options)
    assert len(seen.updates) == 10
    assert sorted(seen.prompts) == list(range(40))


def test_the_rollout_at_hand_is_trained_to_its_end_before_other_prompts_come(make_module, run, saved_at):
    path, _ = saved_at(3, rollout=TWO_UPDATES)
    seen = run(make_module(rollout=TWO_UPDATES), 40, ckpt_path=path, max_epochs=2, max_steps=3 + 1 + 10)
    assert seen.updates[:3] == [(1, 1), (2, 0), (2, 1)]
    assert len(seen.updates) == 11
    assert sorted(seen.prompts) == list(range(40))


@pytest.mark.parametrize(
    ("stop", "limits"),
    [
        (3, {"max_epochs": 3}),
        (4, {"max_epochs": -1, "max_steps": 9}),
        *(pytest.param(stop, {"max_steps": 99}, marks=pytest.mark.slow) for stop in (2, 4, 7)),
        *(pytest.param(stop, {"max_epochs": -1, "max_steps": 9}, marks=pytest.mark.slow) for stop in (2, 3, 7)),
    ],
)
def test_what_an_epochs_end_has_saved_goes_on_as_the_run_would_have(make_module, run, tmp_path, weights, stop, limits):
    """At a whole epoch's end, of 4 updates, and at that of one which `max_steps` has stopped."""
    options = {"accumulate_grad_batches": 2, "check_val_every_n_epoch": 2, "max_epochs": 3} | limits
    options["val_dataloaders"] = DataLoader(rows(2), collate_fn=list)
    through, resumed = make_module(rollout=TWO_UPDATES), make_module(seed=5, rollout=TWO_UPDATES)
    expected = run(through, 16, **options)
    saver = RunCheckpoint(tmp_path)
    first = options | {"max_epochs": -1, "max_steps": stop, "callbacks": [saver], "enable_checkpointing": True}
    before = run(make_module(rollout=TWO_UPDATES), 16, **first)
    after = run(resumed, 16, ckpt_path=tmp_path / "last.ckpt", **options)
    assert torch.equal(weights(resumed), weights(through))
    assert before.updates + after.updates == expected.updates
    assert after.batches == expected.batches[len(before.batches) :]


@pytest.mark.parametrize("limits", [{"max_epochs": 2, "max_steps": 99}, pytest.param({}, marks=pytest.mark.slow)])
def test_a_whole_epoch_of_other_data_follows_one_that_was_stopped(make_module, run, tmp_path, limits):
    saver = RunCheckpoint(tmp_path)
    options = {"rollout": ONE_UPDATE}
    first = {"max_epochs": -1, "max_steps": 3, "callbacks": [saver], "enable_checkpointing": True}
    run(make_module(**options), 24, **first)
    seen = run(make_module(**options), 40, ckpt_path=tmp_path / "last.ckpt", **{"max_epochs": 2} | limits)
    assert len(seen.updates) == 20
    assert sorted(seen.prompts[:40]) == sorted(seen.prompts[40:]) == list(range(40))


def evaluate(stage, module, path):
    trainer = L.Trainer(accelerator="cpu", barebones=True)
    prompts = DataLoader(rows(4), batch_size=2, collate_fn=list)
    return getattr(trainer, stage)(module, prompts, ckpt_path=path)


@pytest.mark.parametrize(
    ("stage", "stop"),
    [("validate", 3), ("test", 4), ("predict", 3), pytest.param("validate", 4, marks=pytest.mark.slow)],
)
def test_a_load_outside_of_fit_brings_weights_and_no_position(make_module, run, saved_at, weights, stage, stop):
    """A fit after it is that of a fresh module with these weights: the same prompts, samples and updates."""
    path, _ = saved_at(stop, rollout=TWO_UPDATES)
    module = make_module(rollout=TWO_UPDATES)
    evaluate(stage, module, path)
    assert (module.microstep, module.rollout) == (0, None)
    loaded = weights(module)
    seen = run(module, 24)
    fresh = make_module(seed=5, rollout=TWO_UPDATES)
    own = torch.load(path, weights_only=True)["state_dict"]
    fresh.load_state_dict(own)
    assert torch.equal(weights(fresh), loaded)
    assert run(fresh, 24).rollouts == seen.rollouts
    assert torch.equal(weights(fresh), weights(module))


def test_a_load_outside_of_fit_leaves_a_trained_modules_position(make_module, run, saved_at):
    path, _ = saved_at(3, rollout=TWO_UPDATES)
    module = make_module(rollout=TWO_UPDATES)
    run(module, 24)
    evaluate("validate", module, path)
    assert module.microstep == 6
    assert run(module, 24).updates[0] == (3, 0)


def test_a_module_that_has_trained_another_rollout_resumes_as_a_fresh_one(make_module, run, saved_at, weights):
    path, _ = saved_at(3, rollout=TWO_UPDATES)
    used, fresh = make_module(rollout=TWO_UPDATES), make_module(rollout=TWO_UPDATES)
    run(used, 40, max_steps=7)
    for module in (used, fresh):
        run(module, 24, ckpt_path=path)
    assert used.microstep == fresh.microstep
    assert torch.equal(weights(used), weights(fresh))


def test_a_checkpoint_saved_before_any_training_starts_a_run(make_module, run, tmp_path, weights):
    module = make_module(rollout=ONE_UPDATE)
    trainer = L.Trainer(accelerator="cpu", barebones=True)
    trainer.validate(module, DataLoader(rows(4), collate_fn=list))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = make_module(seed=5, rollout=ONE_UPDATE)
    seen = run(resumed, 24, ckpt_path=tmp_path / "a.ckpt")
    assert seen.rollouts == run(module, 24).rollouts
    assert torch.equal(weights(resumed), weights(module))


def test_another_seed_is_refused_by_name(make_module, run, saved_at, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    path, _ = saved_at(3, rollout=TWO_UPDATES)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    with pytest.raises(
        ValueError, match="another seed_everything: the checkpoint was saved with 1, the settings say 2"
    ):
        run(make_module(rollout=TWO_UPDATES), 24, ckpt_path=path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    run(make_module(rollout=TWO_UPDATES), 24, ckpt_path=path)


def test_a_checkpoint_that_does_not_say_its_seed_is_accepted_with_one_warning(make_module, run, saved_at):
    path, before = saved_at(3, rollout=TWO_UPDATES)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["gvpo"]["units"]["seed_everything"], checkpoint["gvpo"]["epoch"]  # as earlier versions saved it
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="does not say which seed its run had") as warned:
        seen = run(make_module(rollout=TWO_UPDATES), 24, ckpt_path=path)
    assert sum("does not say which seed" in str(warning.message) for warning in warned) == 1
    assert sorted(before + seen.prompts) == list(range(24))


def test_the_seed_is_that_of_the_fits_start(make_module, run):
    """A callback that seeds torch for itself does not change which prompts come."""

    class Seeds(Callback):
        def on_train_batch_start(self, *_):
            L.seed_everything(9, verbose=False)

    expected = run(make_module(rollout=ONE_UPDATE), 24).rollouts
    assert run(make_module(rollout=ONE_UPDATE), 24, callbacks=[Seeds()]).rollouts == expected


def test_load_from_checkpoint_needs_no_trainer(make_module, run, saved_at, tokenizer, tiny_policy, weights, tmp_path):
    path, _ = saved_at(3, rollout=TWO_UPDATES)
    tiny_policy(7).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    saved = torch.load(path, weights_only=True)["state_dict"]
    for policy in (str(tmp_path / "policy"), tiny_policy(8)):
        module = GVPOModule.load_from_checkpoint(
            path,
            policy=policy,
            reward=lambda prompts, completions, **columns: [0.0] * len(completions),
            tokenizer=tokenizer,
            rollout=TWO_UPDATES,
            generation=GenerationSettings(max_new_tokens=4),
        )
        assert all(torch.equal(tensor, saved[name]) for name, tensor in module.state_dict().items())
        assert module.microstep == 0
        module.export(tmp_path / f"export {type(policy).__name__}")
        assert len(run(module, 24).updates) == 6


def test_what_an_evaluation_loads_changes_no_setting_or_summary_of_a_fit(make_module, saved_at, tmp_path):
    """With one Trainer for both, whose callbacks the evaluation has given their states of the other run."""
    path, _ = saved_at(3, rollout=TWO_UPDATES)  # at a learning rate of 3e-3
    module = make_module(rollout=TWO_UPDATES, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3))
    summary, prompts = RunSummary(), DataLoader(rows(4), collate_fn=list)
    options = {"accelerator": "cpu", "logger": False, "max_steps": 4, "default_root_dir": tmp_path / "run"}
    trainer = L.Trainer(callbacks=[summary], **options)
    trainer.fit(module, RolloutLoader(rows(24), module), prompts)
    before = summary.reward_before
    trainer.save_checkpoint(tmp_path / "other.ckpt")
    for other in (tmp_path / "other.ckpt", path):
        trainer.validate(module, prompts, ckpt_path=other, verbose=False)
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, RolloutLoader(rows(24), module), prompts)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert [point["step"] for point in summary.history] == [6, 8]
    assert summary.reward_before != before  # measured anew, on the weights that the fit began with
    assert module.seconds["train"] < summary._seconds()
