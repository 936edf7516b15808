"""`RunCheckpoint`: whole or not there, whatever moment the process dies at, and on a full disk."""

import os
import resource
import shutil
import signal
import subprocess
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from gvpo_lightning.atomic import PARTIAL
from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.checkpointing.save import CheckpointError
from gvpo_lightning.reference.settings import ReferenceSettings
from gvpo_lightning.rollout.settings import RolloutSettings
from tests.checkpointing.checkpoint_runs import fit as fit_network
from tests.checkpointing.checkpoint_runs import network
from tests.forked import FORK
from tests.ports import reserved_port


def run_network(folder: Path, strategy: str = "single", steps: int = 2, **dying) -> list[int]:
    """Exit codes of a run of every rank."""
    folder.mkdir(exist_ok=True)
    with reserved_port() as port:
        processes = [
            FORK.Process(target=fit_network, args=(str(folder), rank, port, strategy, steps), kwargs=dying)
            for rank in range(1 if strategy == "single" else 2)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def step_of(last: Path) -> int:
    """Of a checkpoint that loads."""
    if last.is_dir():
        names = {path.name for path in last.iterdir()}
        assert names == {".metadata", "meta.pt", "__0_0.distcp", "__1_0.distcp"}
        return torch.load(last / "meta.pt")["global_step"]
    return torch.load(last)["global_step"]


@pytest.mark.parametrize("strategy", ["single", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_dying_before_any_change_of_the_folder_leaves_last_whole(tmp_path, strategy):
    assert set(run_network(tmp_path / "through", strategy)) == {0}, (tmp_path / "through" / "rank0.err").read_text()
    changes = (tmp_path / "through" / "changes").read_text().splitlines()
    kinds = {line.split()[0] for line in changes}
    assert {"os.rename", "os.symlink", "os.remove"} <= kinds
    for number in range(len(changes)):
        run = tmp_path / f"run{number}"
        assert run_network(run, strategy, die_at=number)[0] == -signal.SIGKILL
        last = run / "checkpoints" / "last.ckpt"
        num_moves = sum(line.startswith("os.rename") and ".last.ckpt" in line for line in changes[:number])
        assert (step_of(last) if last.exists() else 0) == num_moves
        for path in (run / "checkpoints").glob("*.ckpt"):
            step_of(path)  # nothing that looks like a checkpoint is none
        assert set(run_network(run, strategy)) == {0}, (run / "rank0.err").read_text()
        assert step_of(last) == 2
        assert not list((run / "checkpoints").glob(f".*{PARTIAL}"))


@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_dying_in_the_middle_of_a_file_leaves_nothing_that_looks_like_a_checkpoint(tmp_path, strategy):
    assert run_network(tmp_path / "run", strategy, die_writing=1)[0] == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert len(list(folder.glob(f".*{PARTIAL}"))) == 1
    assert not list(folder.glob("*.ckpt"))
    assert run_network(tmp_path / "run", strategy, die_writing=2)[0] == -signal.SIGKILL
    assert {path.name for path in folder.glob("*.ckpt")} == {"last.ckpt", "epoch=0-step=1.ckpt"}
    assert step_of(folder / "last.ckpt") == 1


def test_distributed_checkpoints_are_folders_that_last_means(tmp_path):
    assert set(run_network(tmp_path / "run", "fsdp2", steps=2)) == {0}, (tmp_path / "run" / "rank0.err").read_text()
    folder = tmp_path / "run" / "checkpoints"
    assert os.readlink(folder / "last.ckpt") == "epoch=0-step=2.ckpt"
    assert step_of(folder / "last.ckpt") == 2
    report = next(line for line in (tmp_path / "run" / "rank0.err").read_text().splitlines() if "MB (policy" in line)
    assert "optimizer 0.0, rollout 0, replay 0, reference 0)" in report
    assert set(run_network(tmp_path / "run", "fsdp2", steps=3)) == {0}, (tmp_path / "run" / "rank0.err").read_text()
    assert "Restored all states" in (tmp_path / "run" / "rank0.err").read_text()
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "epoch=0-step=3.ckpt"}


def test_an_unfinished_folder_of_another_callback_is_not_last(tmp_path):
    (tmp_path / "checkpoints" / "last.ckpt").mkdir(parents=True)
    (tmp_path / "checkpoints" / "last.ckpt" / "__0_0.distcp").touch()
    trainer, module, data = network(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt is not whole: none beside it is whole"):
        trainer.fit(module, data, ckpt_path="last")
    assert trainer.global_step == 0


def test_last_says_that_there_is_none_yet(tmp_path, caplog):
    trainer, module, data = network(tmp_path)
    with caplog.at_level("INFO"):
        trainer.fit(module, data, ckpt_path="last")
    assert "there is no checkpoint yet, the run starts from the beginning" in caplog.text


class Falling(L.Callback):
    """A metric that gets worse after the second step."""

    def on_train_batch_end(self, trainer, module, *_):
        module.log("score", float(-abs(trainer.global_step - 2)))


def test_last_is_the_newest_where_a_metric_chooses_another(tmp_path):
    callback = RunCheckpoint(tmp_path, filename="{step}", monitor="score", mode="max", every_n_train_steps=1)
    trainer, module, data = network(tmp_path, callback=callback)
    trainer.callbacks.insert(0, Falling())
    trainer.fit(module, data)
    assert Path(callback.best_model_path).name == "step=2.ckpt"
    assert step_of(tmp_path / "last.ckpt") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"step=2.ckpt", "latest-step=4.ckpt", "last.ckpt"}


def test_settings_that_would_overwrite_in_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set save_top_k=1"):
        RunCheckpoint(save_top_k=0)
    with pytest.raises(ValueError, match="enable_version_counter=False"):
        RunCheckpoint(enable_version_counter=False)
    trainer, module, data = network(tmp_path, plugins=[AsyncCheckpointIO()])
    with pytest.raises(ValueError, match="AsyncCheckpointIO"):
        trainer.fit(module, data)


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KB of its own."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def assert_only_the_first_is_there(folder: Path, error: CheckpointError) -> None:
    message = str(error)
    assert "\n" not in message
    assert str(folder / "epoch=0-step=2.ckpt") in message
    assert "MB are free" in message
    assert "ckpt_path=last" in message
    assert {path.name for path in folder.iterdir()} >= {"epoch=0-step=1.ckpt", "last.ckpt"}
    assert not list(folder.glob("*step=2*"))
    assert not list(folder.glob(f".*{PARTIAL}"))
    assert step_of(folder / "last.ckpt") == 1


def test_a_really_full_file_system_leaves_the_last_checkpoint_as_it_was(full_disk):
    class Filler(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                (full_disk / "other").write_bytes(b"x" * (shutil.disk_usage(full_disk).free - 4096))

    trainer, module, data = network(full_disk, callback=RunCheckpoint(full_disk, every_n_train_steps=1))
    trainer.callbacks.insert(0, Filler())
    with pytest.raises(CheckpointError, match="No space left on device") as failed:
        trainer.fit(module, data)
    assert_only_the_first_is_there(full_disk, failed.value)


def test_a_limit_on_file_sizes_leaves_the_last_checkpoint_as_it_was_by_rlimit_fsize(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limiter(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    trainer, module, data = network(tmp_path, callback=RunCheckpoint(tmp_path, every_n_train_steps=1))
    trainer.callbacks.insert(0, Limiter())
    try:
        with pytest.raises(CheckpointError, match="File too large") as failed:
            trainer.fit(module, data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_only_the_first_is_there(tmp_path, failed.value)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_limit_on_one_ranks_files_ends_both_ranks_by_rlimit_fsize(tmp_path, strategy):
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert run_network(run, strategy, full_at=2) == [1, 1]
    assert "epoch=0-step=2.ckpt could not be written: File too large (rank 0)" in (run / "rank1.err").read_text()
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", "epoch=0-step=1.ckpt"}
    assert step_of(folder / "last.ckpt") == 1


def test_a_frozen_reference_from_a_folder_costs_no_room(make_module, fit, arithmetic, tmp_path, caplog):
    sizes = {}
    for kind in ("frozen", "previous", "ema"):
        settings = ReferenceSettings(kind, decay=0.5 if kind == "ema" else None)
        module = make_module(policy=str(arithmetic / "model"), reference=settings)
        callback = RunCheckpoint(tmp_path / kind)
        with caplog.at_level("INFO"):
            fit(module, max_steps=2, enable_checkpointing=True, callbacks=[callback])
        sizes[kind] = (tmp_path / kind / "last.ckpt").stat().st_size
    weights = sum(p.numel() * 4 for p in module.policy.parameters())
    assert abs(sizes["frozen"] - sizes["previous"]) < 4096
    assert sizes["ema"] - sizes["previous"] > 0.9 * weights
    reports = [line for line in caplog.text.splitlines() if "MB (policy" in line]
    assert len(reports) == 3
    total = f"{sizes['frozen'] / 1e6:.1f} MB (policy {weights / 1e6:.1f}, optimizer {2 * weights / 1e6:.1f}, "
    assert total in reports[0]
    assert reports[0].endswith("reference 0)")
    assert reports[2].endswith(f"reference {weights / 1e6:.1f})")


@pytest.mark.parametrize("limit", ["max_epochs", "max_steps"])
@pytest.mark.parametrize(
    "when", [{"every_n_train_steps": 1, "save_on_train_epoch_end": False}, {}], ids=["batch", "epoch"]
)
def test_a_checkpoint_of_an_epochs_last_batch_goes_on(make_module, fit, weights, tmp_path, limit, when):
    """An epoch is 3 rollouts of 2 updates; resumed with the limit that it stopped at, it is at its end."""
    through = make_module()
    fit(through, max_steps=-1, max_epochs=2)
    ends = {"max_epochs": (1, 2), "max_steps": (6, 12)}[limit]
    first = RunCheckpoint(tmp_path / "checkpoints", **when)
    limits = {"max_steps": -1} | {limit: ends[0]}
    fit(make_module(), enable_checkpointing=True, callbacks=[first], **limits)
    last = tmp_path / "checkpoints" / "last.ckpt"
    for end, steps in zip(ends, (6, 12), strict=True):
        module = make_module()
        trainer = fit(module, ckpt_path=last, **(limits | {limit: end}))
        assert trainer.global_step == steps
    assert torch.equal(weights(module), weights(through))


def test_saves_by_the_clock_are_of_whole_updates(make_module, fit, tmp_path):
    callback = RunCheckpoint(tmp_path / "checkpoints", save_top_k=-1, train_time_interval=timedelta(0))
    rollout = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=4, micro_batch_size=4)
    fit(
        make_module(rollout=rollout),
        max_steps=3,
        accumulate_grad_batches=4,
        enable_checkpointing=True,
        callbacks=[callback],
    )
    saved = [torch.load(path)["gvpo"]["microstep"] for path in (tmp_path / "checkpoints").glob("epoch*.ckpt")]
    assert sorted(saved) == [4, 8, 12]
