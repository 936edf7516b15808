"""`last.ckpt` leads to the newest whole checkpoint, whatever it is called and wherever its folder was moved."""

import os
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch

from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.cli import last_checkpoint
from tests.checkpointing.checkpoint_runs import network

SCORES = (0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.6)


class Scored(L.Callback):
    """A metric with slashes, another one after every step."""

    def on_train_batch_end(self, trainer, module, *_):
        module.log("validation/reward/mean", SCORES[trainer.global_step - 1])


def train(folder: Path, steps: int, ckpt_path=None, **settings) -> RunCheckpoint:
    """Steps of a small network, each of them scored and due to be saved."""
    arguments = {"filename": "{step}-{validation/reward/mean:.3f}", "monitor": "validation/reward/mean", "mode": "max"}
    callback = RunCheckpoint(**({"dirpath": folder, "every_n_train_steps": 1} | arguments | settings))
    trainer, module, data = network(Path("elsewhere"), steps=steps, callback=callback)
    trainer.callbacks.insert(0, Scored())
    trainer.fit(module, data, ckpt_path=ckpt_path)
    assert trainer.global_step == steps
    return callback


def steps_in(folder: Path) -> dict[str, int]:
    """The step of every checkpoint there, by its path; folders without one must not be left."""
    paths = list(folder.rglob("*"))
    assert all(any(p.rglob("*.ckpt")) for p in paths if p.is_dir())
    return {str(path.relative_to(folder)): torch.load(path)["global_step"] for path in paths if path.is_file()}


def named(*steps: int) -> dict[str, int]:
    return {f"step={n}-validation/reward/mean={SCORES[n - 1]:.3f}.ckpt": n for n in steps}


@pytest.mark.parametrize("dirpath", ["run", Path("a", "b"), "../here/run"])
def test_last_leads_into_the_folders_of_a_metric_with_slashes(tmp_path, monkeypatch, dirpath):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    best = train(dirpath, 4, save_top_k=2).best_model_path
    assert steps_in(Path(dirpath)) == named(1, 3) | {"latest-step=4.ckpt": 4, "last.ckpt": 4}
    assert torch.load(best)["global_step"] == 3
    resumed = train(dirpath, 5, "last", save_top_k=2)
    assert steps_in(Path(dirpath)) == named(3, 5) | {"last.ckpt": 5}
    assert os.readlink(Path(dirpath, "last.ckpt")) == next(iter(named(5)))
    assert {os.path.relpath(path, dirpath) for path in resumed.best_k_models} == named(3, 5).keys()
    callbacks = [{"class_path": "gvpo_lightning.callbacks.RunCheckpoint", "init_args": {"dirpath": str(dirpath)}}]
    assert torch.load(last_checkpoint({"callbacks": callbacks}))["global_step"] == 5


def test_what_a_killed_save_has_left_in_a_folder_of_a_metric_is_removed(tmp_path):
    left = tmp_path / "step=1-validation" / "reward" / ".mean=0.500.ckpt.1.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    train(tmp_path, 1)
    assert not left.exists()


@pytest.mark.parametrize("copies", [False, True])
def test_a_run_whose_folder_was_moved_goes_on_in_it(tmp_path, copies):
    train(tmp_path / "run", 4, save_top_k=2)
    (shutil.copytree if copies else shutil.move)(
        tmp_path / "run", tmp_path / "run2", **{"symlinks": True} if copies else {}
    )
    callback = train(tmp_path / "run2", 5, "last", save_top_k=2)
    assert steps_in(tmp_path / "run2") == named(3, 5) | {"last.ckpt": 5}
    assert callback.best_k_models.keys() == {str(tmp_path / "run2" / name) for name in named(3, 5)}
    assert callback.best_model_path == str(tmp_path / "run2" / next(iter(named(3))))
    if copies:
        assert steps_in(tmp_path / "run") == named(1, 3) | {"latest-step=4.ckpt": 4, "last.ckpt": 4}


def test_what_did_not_move_along_is_not_counted_among_the_best(tmp_path):
    train(tmp_path / "run", 4, save_top_k=2)
    shutil.move(tmp_path / "run", tmp_path / "run2")
    shutil.rmtree(tmp_path / "run2" / "step=1-validation")
    train(tmp_path / "run2", 6, "last", save_top_k=2)
    assert steps_in(tmp_path / "run2") == named(3, 5) | {"latest-step=6.ckpt": 6, "last.ckpt": 6}


def test_a_run_that_starts_from_anothers_checkpoint_leaves_that_ones_alone(tmp_path):
    train(tmp_path / "old", 3, save_top_k=2)
    train(tmp_path / "new", 2, save_top_k=2)  # of another run
    before = steps_in(tmp_path / "old"), steps_in(tmp_path / "new")
    train(tmp_path / "new", 5, tmp_path / "old" / "last.ckpt", save_top_k=2)
    assert steps_in(tmp_path / "old") == before[0]
    after = steps_in(tmp_path / "new")
    assert before[1].items() <= after.items()
    assert after["last-v1.ckpt"] == 5


def test_last_goes_on_being_moved_where_the_checkpoints_come_at_other_times(tmp_path):
    train(tmp_path, 2, save_top_k=1)
    train(tmp_path, 6, "last", save_top_k=1, every_n_train_steps=2)
    assert {path.name for path in tmp_path.glob("last*")} == {"last.ckpt"}
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_last_that_is_not_whole_is_an_error_which_names_what_is(tmp_path):
    train(tmp_path, 3, save_top_k=-1)
    last, whole = tmp_path / "last.ckpt", [str(tmp_path / name) for name in named(3, 2, 1)]
    target = last.resolve()
    content = target.read_bytes()
    for breaks in ("cut", "empty", "gone"):
        if breaks == "gone":
            target.unlink()
        else:
            target.write_bytes(content[: len(content) // 2 if breaks == "cut" else 0])
        message = rf"^ckpt_path=last: {last} is a link to .*, which is gone or not whole: give one of the whole "
        with pytest.raises(FileNotFoundError, match=message) as refused:
            train(tmp_path, 4, "last", save_top_k=-1)
        assert f"newest first: {whole[1]}, {whole[2]}. To start" in str(refused.value)
        with pytest.raises(FileNotFoundError, match=message):
            last_checkpoint({"callbacks": [{"init_args": {"dirpath": str(tmp_path)}}]})
    train(tmp_path, 4, whole[1], save_top_k=-1)
    assert torch.load(last)["global_step"] == 4


def test_of_several_the_newest_last_counts(tmp_path):
    train(tmp_path, 1)
    shutil.copy(tmp_path / "last.ckpt", tmp_path / "last-v1.ckpt")
    os.utime(tmp_path / "last-v1.ckpt", (2e9, 2e9))
    (tmp_path / "lasting.ckpt").touch()
    assert last_checkpoint({"callbacks": [{"init_args": {"dirpath": str(tmp_path)}}]}).name == "last-v1.ckpt"
