"""Whatever stops a run before its end, the last line that it leaves resumes it."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

from gvpo_lightning.callbacks import RunCheckpoint
from gvpo_lightning.checkpointing.resumption import NOTHING, Command
from gvpo_lightning.cli import main
from tests.checkpointing.checkpoint_runs import command
from tests.conftest import digit_reward
from tests.forked import FORK

# what ends a run in its fourth rollout, while the file `breaks` says so; in the process that trains, or in a worker's
ENDING = """
import os, signal, time

calls = 0

def ending(prompts, completions, answer):
    global calls
    calls += 1
    how = open("breaks").read() if os.path.exists("breaks") else ""
    if calls >= 4 and how == "raise":
        raise KeyError("no judge")
    if calls == 4 and how.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.5)
    if how == "wait":
        open("calls", "a").write(".")
        time.sleep(0.3)
    return [float(text == a) + 0.01 * len(text) for text, a in zip(completions, answer)]

ending.in_process = not os.path.exists("workers")

import lightning as L

ERRORS = {"crash": RuntimeError, "value": ValueError, "ctrl-c": KeyboardInterrupt}

class Crash(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        how = open("breaks").read() if os.path.exists("breaks") else ""
        if module.microstep == 7 and how in ERRORS:
            raise ERRORS[how]("out of order")
"""


@pytest.fixture
def folder(arithmetic, tmp_path):
    """A config whose run has a name that a shell takes apart: four rollouts of two updates of two micro-batches."""
    settings = {
        "trainer": {
            **{"accelerator": "cpu", "max_steps": 8, "default_root_dir": "my run", "accumulate_grad_batches": 2},
            **{"enable_progress_bar": False, "enable_model_summary": False, "logger": False},
        },
        "model": {
            "policy": str(arithmetic / "model"),
            "reward": "ending.ending",
            "rollout": {"group_size": 4, "prompts_per_rollout": 4, "prompts_per_update": 2},
            "generation": {"max_new_tokens": 4},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"path": str(arithmetic / "sums"), "train_split": "train[:16]", "validation_split": None},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    (tmp_path / "ending.py").write_text(ENDING)
    return tmp_path


SAVING = ["--trainer.callbacks+=gvpo_lightning.callbacks.RunCheckpoint", "--trainer.callbacks.every_n_train_steps=1"]


def run(folder: Path, words: list[str]) -> tuple[int, list[str]]:
    """Exit status and stderr of the command."""
    process = FORK.Process(target=command, args=(str(folder), words))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode, (folder / "err").read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("breaks", "status"), [("SIGINT", 1), ("SIGTERM", 143), ("raise", 1), ("crash", 1), ("value", 1)]
)
def test_the_command_on_the_last_line_ends_the_run_as_if_it_had_not_stopped(folder, breaks, status):
    words = ["fit", "--config", "config.yaml", "--trainer.callbacks+=ending.Crash", *SAVING, "--ckpt_path", "last"]
    (folder / "breaks").write_text(breaks)
    ended, errors = run(folder, words)
    assert ended == status, errors
    line = errors[-1]
    assert line == shlex.join(["gvpo", *words[:-2], "--ckpt_path", "my run/checkpoints/last.ckpt"])
    (folder / "breaks").unlink()
    again, errors = run(folder, shlex.split(line)[1:])
    assert again == 0, errors
    assert "Restored all states from the checkpoint at my run/checkpoints/last.ckpt" in errors
    state = torch.load(folder / "my run" / "checkpoints" / "last.ckpt")
    through, errors = run(folder, [*words[:-2], "--trainer.default_root_dir=through"])
    assert through == 0, errors
    expected = torch.load(folder / "through" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == expected["global_step"] == 8
    assert all(torch.equal(state["state_dict"][name], value) for name, value in expected["state_dict"].items())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_the_last_line_where_the_whole_process_group_is_told(folder, number):
    """As from a terminal, or by a scheduler: the rewards' workers and the second rank get the signal too."""
    (folder / "breaks").write_text("wait")
    (folder / "workers").touch()
    words = ["fit", "--config", "config.yaml", *SAVING, "--trainer.devices=2", "--trainer.strategy=ddp"]
    command_line = [sys.executable, "-m", "gvpo_lightning.cli", *words]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with open(folder / "err", "w") as err:
        process = subprocess.Popen(command_line, cwd=folder, stderr=err, start_new_session=True)
        signal.signal(signal.SIGINT, before)
        while process.poll() is None and not list(folder.glob("my run/checkpoints/last.ckpt")):
            pass
        os.killpg(process.pid, number)
        assert process.wait(60) == (1 if number == signal.SIGINT else 143)
    line = shlex.join(["gvpo", *words, "--ckpt_path", "my run/checkpoints/last.ckpt"])
    assert (folder / "err").read_text().splitlines()[-1] == line


def test_the_command_says_it_after_its_errors_and_says_nothing_of_mistakes(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "ending", raising=False)
    words = ["fit", "--config", "config.yaml", "--trainer.callbacks+=ending.Crash"]
    (folder / "breaks").write_text("crash")
    with pytest.raises(RuntimeError, match="out of order") as crashed:
        main([*words, "--trainer.enable_checkpointing=false"])
    assert crashed.value.__notes__[-1] == NOTHING
    (folder / "breaks").write_text("ctrl-c")
    with pytest.raises(SystemExit):
        main([*words, *SAVING])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == shlex.join(["gvpo", *words, *SAVING, "--ckpt_path", "my run/checkpoints/last.ckpt"])
    with pytest.raises(SystemExit):
        main([*words, "--trainer.limit_train_batches=3"])
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("gvpo: error: An epoch must hold whole optimizer updates")
    )
    (folder / "breaks").unlink()
    main([*shlex.split(line)[1:], "--trainer.max_steps=4"])
    assert torch.load("my run/checkpoints/last.ckpt")["global_step"] == 4


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["fit"], "gvpo fit --ckpt_path 'a b.ckpt'"),
        (["fit", "--ckpt_path=x", "--n", "1"], "gvpo fit --n 1 --ckpt_path 'a b.ckpt'"),
        (["fit", "--ckpt_path", "--n=1 2", "--ckpt_paths", "y"], "gvpo fit --ckpt_paths y --ckpt_path 'a b.ckpt'"),
        (["fit", "--a=$HOME", "--ckpt_path", "last", "-c", ""], "gvpo fit '--a=$HOME' -c '' --ckpt_path 'a b.ckpt'"),
    ],
)
def test_the_command_is_quoted_for_a_shell_and_names_one_checkpoint(words, line):
    stopped = Command(["gvpo", *words])
    stopped.stopped("a b.ckpt")
    assert stopped.line == line


class Raises(L.Callback):
    def __init__(self, error: BaseException, step: int = 3):
        self.error, self.step = error, step

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step:
            raise self.error


def test_from_python_the_exceptions_last_note_is_the_call(make_module, fit, tmp_path):
    last = str(tmp_path / "a" / "last.ckpt")
    saver = RunCheckpoint(tmp_path / "a", every_n_train_steps=2)
    with pytest.raises(RuntimeError) as failed:
        fit(make_module(), enable_checkpointing=True, callbacks=[Raises(RuntimeError()), saver])
    assert failed.value.__notes__[-1] == f"trainer.fit(..., ckpt_path={last!r})"
    with pytest.raises(RuntimeError) as failed:  # resumed, and stopped before it has saved anything of its own
        fit(make_module(), ckpt_path=last, callbacks=[Raises(RuntimeError())])
    assert failed.value.__notes__[-1] == f"trainer.fit(..., ckpt_path={last!r})"
    with pytest.raises(RuntimeError) as failed:
        fit(make_module(), callbacks=[Raises(RuntimeError())])
    assert failed.value.__notes__[-1] == NOTHING
    trainer = fit(make_module(), ckpt_path=last)
    assert trainer.global_step == 8


def test_from_python_ctrl_c_ends_the_log_with_the_call(make_module, fit, tmp_path, caplog):
    saver = RunCheckpoint(tmp_path / "a", every_n_train_steps=2)
    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        fit(make_module(), enable_checkpointing=True, callbacks=[Raises(KeyboardInterrupt()), saver])
    assert caplog.messages[-1] == f"trainer.fit(..., ckpt_path={str(tmp_path / 'a' / 'last.ckpt')!r})"


def test_updates_that_are_given_up_and_rewards_that_fail_name_it_last(make_module, fit, tmp_path):
    calls = []

    def failing(prompts, completions, **columns):
        calls.append(1)
        if len(calls) >= 3:
            raise KeyError("no judge")
        return digit_reward(prompts, completions)

    with pytest.raises(RuntimeError, match="has failed on") as failed:
        fit(make_module(reward=failing))
    assert failed.value.__notes__[-1] == f"trainer.fit(..., ckpt_path={str(tmp_path / 'stopped-step=4.ckpt')!r})"
    saver = RunCheckpoint(tmp_path / "a", every_n_train_steps=1)
    with pytest.raises(Exception, match="in a row") as failed:
        fit(make_module(max_log_ratio=1e-6, max_skipped_updates=1), enable_checkpointing=True, callbacks=[saver])
    assert failed.value.__notes__[-1] == f"trainer.fit(..., ckpt_path={str(tmp_path / 'a' / 'last.ckpt')!r})"
