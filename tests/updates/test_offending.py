"""A run whose updates can't be used stops and leaves the last one; `gvpo debug-batch` shows what was to blame."""

import json
import re

import lightning as L
import pytest
import torch

from gvpo_lightning.cli import main
from gvpo_lightning.data.batch import CompletionBatch, collate_completions, dropped_completion
from gvpo_lightning.rollout.settings import RolloutSettings
from gvpo_lightning.updates.failed_update import OffendingUpdate, load_offending_update
from tests.watching import on_rollout

FILE = "offending_update_rank0.pt"


class At(L.Callback):
    """Does something to the module before micro-batches from the given one on."""

    def __init__(self, step, action) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.microstep >= self.step:
            self.action(pl_module)


@torch.no_grad()
def break_a_weight(module):
    module.policy.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan


class BreaksAWeight(At):
    """For configs."""

    def __init__(self) -> None:
        super().__init__(1, break_a_weight)


@pytest.fixture
def folder(tiny_policy, tokenizer, tmp_path):
    """The policy that `make_module` trains, saved."""
    tiny_policy().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def debug_batch(folder, tmp_path, capsys, monkeypatch):
    """What the command prints, for the file that a run of this test left."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, batch=tmp_path / FILE) -> str:
        reward = "--model.reward=gvpo_lightning.rewards.ExactAnswer"
        main(["debug-batch", f"--model.policy={folder}", reward, f"--batch={batch}", *arguments])
        return capsys.readouterr().out

    return run


ONE_ROLLOUT = {"rollout": RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=2)}


def stop(fit, module, match, **trainer_arguments):
    with pytest.raises(RuntimeError, match=match):
        fit(module, **trainer_arguments)


def test_a_weight_that_becomes_nan_is_named(make_module, fit, debug_batch, tmp_path):
    module = make_module(**ONE_ROLLOUT, max_skipped_updates=1)
    message = rf"2 updates in a row.*{tmp_path / FILE}: `gvpo debug-batch --config CONFIG --batch {tmp_path / FILE}`"
    stop(fit, module, message, callbacks=[At(2, break_a_weight)])
    assert module.run.num_updates == 4  # two are trained, two are skipped
    saved = load_offending_update(tmp_path / FILE)
    assert saved.parameters["weights"] == ["model.layers.1.mlp.up_proj.weight"]
    assert "model.layers.0.mlp.up_proj.weight" in saved.parameters["gradients"]
    assert not torch.isfinite(saved.log_ratios).any()
    assert torch.equal(saved.bad_tokens, saved.batch.completion_mask)

    shown = debug_batch()  # under the policy that training started from
    assert "log-ratios not finite: 8 of 8" in shown
    assert "weights not finite: model.layers.1.mlp.up_proj.weight" in shown
    assert "in the run: all tokens" in shown
    assert "All is sound here: the weights that the run had by then" in shown
    state = {f"policy.{name}": value for name, value in module.policy.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "broken.ckpt")
    assert "The policy is broken" in debug_batch(f"--ckpt_path={tmp_path / 'broken.ckpt'}")


def test_the_completion_to_blame_is_shown_first(make_module, fit, debug_batch, tmp_path, tokenizer):
    settings = RolloutSettings(group_size=4, prompts_per_rollout=8, prompts_per_update=8)
    module = make_module(rollout=settings, max_skipped_updates=0)

    def break_a_token(rollout):
        rollout.batch.reference_logprobs[5, 1] = -torch.inf

    on_rollout(module, after=break_a_token)
    stop(fit, module, "1 updates in a row")
    batch, saved = module.rollout.batch, load_offending_update(tmp_path / FILE)
    row = saved.bad_tokens.any(dim=1).nonzero().item()
    assert saved.bad_tokens.sum() == 1
    assert saved.texts[row] == module.rollout.completions[5]
    assert saved.prompts[row] == module.rollout.prompts[1]
    assert saved.batch.rewards[row] == batch.rewards[5]
    assert saved.batch.group_ids[row] == 1
    assert set(saved.sources) == {"policy"}
    assert saved.settings["beta"] == 0.5
    assert saved.settings["step"] == 1

    lines = debug_batch().splitlines()
    first = next(line for line in lines if line.startswith("│"))
    cells = [cell.strip() for cell in first.strip("│").split("│")]
    assert cells[:3] == [str(row), "1", "policy"]
    assert cells[4:6] == ["inf", "inf"]
    assert cells[6].startswith(str(module.rollout.prompts[1]))
    token = tokenizer.convert_ids_to_tokens(int(batch.completion_ids[5, 1]))
    assert cells[7] == f"reference: {token!r} at 1; in the run: {token!r} at 1; now: {token!r} at 1"
    assert any(line.startswith("The weights are finite: completions and groups at the top") for line in lines)


def test_log_ratios_beyond_the_limit_are_skipped_and_then_stop_the_run(make_module, fit, debug_batch, tmp_path):
    def diverging(**settings):
        return make_module(optimizer=lambda p: torch.optim.SGD(p, lr=300.0), **ONE_ROLLOUT, **settings)

    fit(diverging(), max_steps=4)  # all is finite and far from 1e4
    module = diverging(max_log_ratio=20.0, max_skipped_updates=0)
    stop(fit, module, r"beyond max_log_ratio=20 .*policy has diverged", max_steps=4)
    saved = load_offending_update(tmp_path / FILE)
    assert torch.isfinite(saved.log_ratios).all()
    assert saved.log_ratios.abs().max() > 20
    state = {f"policy.{name}": value for name, value in module.policy.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "diverged.ckpt")
    shown = debug_batch(f"--ckpt_path={tmp_path / 'diverged.ckpt'}")
    worst = float(saved.log_ratios[saved.log_ratios.abs().argmax()])
    first = next(line for line in shown.splitlines() if line.startswith("│"))
    cells = [cell.strip() for cell in first.strip("│").split("│")]
    assert float(cells[4]) == pytest.approx(worst, rel=1e-3)
    assert float(cells[5]) == pytest.approx(worst, rel=1e-3)  # the same weights give the same again
    beyond = int((saved.log_ratios.abs() > 20).sum())
    assert shown.count(f"finite, but beyond 20: {beyond}") == 2


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_update_beyond_the_limit_moves_nothing(make_module, fit, weights, accumulate):
    settings = RolloutSettings(group_size=4, prompts_per_rollout=4, prompts_per_update=2)
    module = make_module(rollout=settings, max_log_ratio=1e-3)
    after = []
    module.on_train_batch_end = lambda *_: after.append(weights(module))
    fit(module, max_steps=2, accumulate_grad_batches=accumulate)
    assert module.updates[1].is_cut == (accumulate == 4)
    assert module.run.skipped_updates == 1  # the first update starts at the reference, the second does not
    assert torch.equal(after[-1], after[accumulate - 1])


def test_a_gradient_alone_is_named(make_module, fit, tmp_path):
    module = make_module(max_skipped_updates=0)

    def poison():
        module.policy.model.norm.weight.grad[3] = torch.inf

    module.on_after_backward = poison
    stop(fit, module, "gradients that are not finite", accumulate_grad_batches=2)
    saved = load_offending_update(tmp_path / FILE)
    assert saved.parameters == {"weights": [], "gradients": ["model.norm.weight"]}
    assert len(saved.batch) == 16  # both micro-batches


def test_a_folder_that_can_not_be_written_does_not_hide_why_the_run_stopped(make_module, fit, tmp_path):
    (tmp_path / "file").write_text("")
    module = make_module(**ONE_ROLLOUT, max_skipped_updates=0)
    stop(
        fit,
        module,
        "1 updates in a row .* could not be saved",
        callbacks=[At(1, break_a_weight)],
        default_root_dir=tmp_path / "file" / "run",
    )


def test_conversations_and_ranks_without_completions_are_saved_and_shown(debug_batch, tmp_path):
    batch = collate_completions([[4, 5], [4, 5], [6]], [[4, 1], [5, 6, 1], [7, 1]], [False] * 3, [0, 0, 1], 0)
    batch.rewards = torch.tensor([0.0, 1.0, 0.5])
    empty = dropped_completion()
    conversation = [{"role": "user", "content": "[bold]how much?[/bold]"}]
    limits = {"beta": 0.5, "temperature": 1.0, "max_log_ratio": 1e4, "num_groups": 1, "step": 3, "num_ranks": 2}
    for name, part in {"full": batch, "empty": empty}.items():
        size = len(part)
        columns = {"texts": ["a :smile:"] * size, "prompts": [conversation] * size, "sources": ["file"] * size}
        nothing, path = torch.zeros(part.completion_mask.shape, dtype=torch.bool), tmp_path / "new" / name
        update = OffendingUpdate(part, torch.zeros(size), nothing, **columns, settings=limits, parameters={})
        update.save(path)
        saved = load_offending_update(path)
        assert isinstance(saved.batch, CompletionBatch)
        assert saved.prompts == columns["prompts"]
        shown = debug_batch(batch=path)
        assert ("[bold]how much?[/bold] → a :smile:" in shown) == (name == "full")
        assert f"log-ratios not finite: 0 of {size}" in shown
        assert "look into the others" in shown


def test_the_command_that_the_stopped_run_names_works(arithmetic, tmp_path, capsys):
    settings = {"policy": str(arithmetic / "model"), "reward": "gvpo_lightning.rewards.ExactAnswer"}
    settings |= {"generation": {"max_new_tokens": 4}, "max_skipped_updates": 0}
    callbacks = [f"{__name__}.BreaksAWeight"]
    trainer = {"accelerator": "cpu", "default_root_dir": str(tmp_path), "callbacks": callbacks}
    trainer |= {"enable_progress_bar": False, "enable_model_summary": False}
    config = {"model": settings, "trainer": trainer, "data": {"path": str(arithmetic / "sums")}}
    (tmp_path / "own.yaml").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="1 updates in a row") as stopped:
        main(["fit", "--config", str(tmp_path / "own.yaml")])
    (command,) = re.findall("`gvpo (.*)`", str(stopped.value))
    assert command.startswith(f"debug-batch --config {tmp_path / 'config.yaml'}")
    main(command.split())
    assert "model.layers.1.mlp.up_proj.weight" in capsys.readouterr().out


def test_other_files_are_refused(debug_batch, tmp_path, capsys):
    torch.save({"state_dict": {}}, tmp_path / "other")
    (tmp_path / "text").write_text("no")
    for name, message in {
        "other": "is not an update that a stopped run has saved",
        "text": "can't be loaded",
        "absent": "is not a file",
    }.items():
        with pytest.raises(SystemExit):
            debug_batch(batch=tmp_path / name)
        assert message in capsys.readouterr().err
