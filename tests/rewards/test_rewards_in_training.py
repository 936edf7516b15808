"""Rewards within a run: what is logged, what failures cost, and what is left when they stop it."""

import json
import os

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from gvpo_lightning.cli import main
from gvpo_lightning.rewards import RewardError, RewardSettings
from tests.forked import run_ranks
from tests.rewards import hanging_script
from tests.rewards.rewards_for_tests import process_id


def digits(prompts, completions, **columns):
    return [sum(c in "56789" for c in text) / 4 + 0.01 * len(text) for text in completions]


def short(prompts, completions, **columns):
    """Does not apply to completions with a 1, fails on those with a 2."""
    if len(completions) > 1:
        return [short([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    if "2" in completions[0]:
        raise KeyError("a 2")
    return [None if "1" in completions[0] else -float(len(completions[0]))]


def test_each_rewards_own_mean_and_what_failed_are_logged_and_failures_leave_their_group(make_module, fit):
    settings = RewardSettings(weights=[1.0, 0.5], max_failed_fraction=1.0)
    module = make_module(reward=[digits, short], reward_settings=settings)
    with pytest.warns(UserWarning, match="(?s)The reward short has failed on .*KeyError: 'a 2'.*on the prompt"):
        trainer = fit(module, max_steps=1, enable_checkpointing=False)
    rollout, metrics = module.rollout, trainer.callback_metrics
    failed = torch.tensor(["2" in text for text in rollout.completions])
    applies = torch.tensor(["1" not in text for text in rollout.completions])
    own = {name: torch.tensor(values) for name, values in rollout.components.items()}
    empty = torch.tensor(rollout.lengths) == 0
    assert failed.any()
    assert (~applies & ~failed).any()
    assert torch.equal(rollout.batch.kept, ~failed & ~empty)
    kept = rollout.batch.kept
    expected = own["digits"] + torch.where(applies, 0.5 * own["short"], 0.0)
    torch.testing.assert_close(rollout.batch.rewards[kept], expected[kept])
    assert metrics["reward/digits/mean"] == pytest.approx(float(own["digits"][kept].mean()))
    assert metrics["reward/digits/std"] == pytest.approx(float(own["digits"][kept].std(correction=0)))
    assert metrics["reward/short/mean"] == pytest.approx(float(own["short"][kept & applies].mean()))
    assert metrics["reward/short/std"] == pytest.approx(float(own["short"][kept & applies].std(correction=0)))
    assert metrics["reward/short/failed_fraction"] == pytest.approx(float(failed.float().mean()))
    assert metrics["reward/digits/failed_fraction"] == 0
    assert metrics["completion/dropped_reward_raised_fraction"] == pytest.approx(float(failed.float().mean()))
    assert metrics["completion/dropped_reward_timeout_fraction"] == 0


def test_validation_and_test_log_each_reward_and_stop_when_they_are_through(make_module, prompts):
    reward = {"reward": [digits, short], "tokenizer": None}
    for fraction in (1.0, 0.0):
        module = make_module(
            **(reward | {"tokenizer": make_module().tokenizer}),
            reward_settings=RewardSettings(max_failed_fraction=fraction),
        )
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        loader = DataLoader(prompts, batch_size=5, collate_fn=list)
        if fraction == 0.0:
            with pytest.raises(RewardError, match=r"(?s)The reward short has failed on .* of 96 completions.*KeyError"):
                trainer.test(module, loader, verbose=False)
            continue
        (metrics,) = trainer.validate(module, loader, verbose=False)
        assert metrics["validation/reward/mean"] == pytest.approx(metrics["validation/reward/digits/mean"], abs=5.0)
        assert 0 < metrics["validation/reward/short/failed_fraction"] < 1
        assert -4 <= metrics["validation/reward/short/mean"] <= -0.0
        assert metrics["validation/reward/short/std"] > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_rewards_have_stopped_goes_on_where_it_was(make_module, fit, weights, tmp_path, accumulate):
    """The reward breaks in the fourth of six rollouts, in the middle of an epoch; the reference is an average."""
    calls = []

    def breaking(prompts, completions, **columns):
        calls.append(len(completions))
        if broken and len(calls) >= 4:
            raise KeyError("the judge is gone")
        return digits(prompts, completions)

    arguments = {"accumulate_grad_batches": accumulate, "max_steps": 12, "enable_checkpointing": True}
    settings = {"reward": breaking, "reference": "previous"}
    broken = False
    whole = make_module(**settings)
    fit(whole, **arguments, callbacks=[], default_root_dir=tmp_path / "whole")
    broken, calls = True, []
    with pytest.raises(RewardError, match="the judge is gone") as stopped:
        fit(make_module(**settings), **arguments, default_root_dir=tmp_path / "stopped")
    (note,) = [note for note in stopped.value.__notes__ if "resume with" in note]
    assert note.startswith("Stopped at step 6: resume with ckpt_path=")
    broken = False
    module = make_module(**settings)
    trainer = fit(module, ckpt_path=note.split("=")[-2] + "=" + note.split("=")[-1].rstrip("."), **arguments)
    assert trainer.global_step == 12
    assert torch.equal(weights(module), weights(whole))
    assert module.rollout.completions == whole.rollout.completions
    assert module.rollout.metrics.keys() == whole.rollout.metrics.keys()


def test_before_the_first_update_nothing_is_saved(make_module, fit, tmp_path):
    def broken(prompts, completions, **columns):
        raise KeyError("typo")

    with pytest.raises(RewardError, match=r"broken has failed on 100.0% of 32 completions \(reward_raised 32\)"):
        fit(make_module(reward=broken))
    assert not list(tmp_path.rglob("*.ckpt"))


class TestInWorkers:
    """As users have it."""

    @pytest.fixture(autouse=True)
    def rewards_in_process(self):
        """Not here."""

    def test_workers_start_with_each_fit_and_end_with_it(self, make_module, fit):
        module = make_module(reward=process_id, reward_settings=RewardSettings(num_workers=2))
        pids = []
        for max_steps in (1, 2):
            fit(module, max_steps=max_steps, rows=[{"prompt": f"{n}+1="} for n in range(8)])
            assert module.rewards._pool is None
            pids += [set(module.rollout.components["process_id"])]
        assert len(pids[0] | pids[1]) == 4
        assert os.getpid() not in pids[0] | pids[1]
        assert not any(os.path.exists(f"/proc/{int(pid)}") for pid in pids[0] | pids[1])

    def test_a_config_names_several_rewards(self, tmp_path, arithmetic, monkeypatch):
        (tmp_path / "own_rewards.py").write_text(
            "def evenness(prompts, completions, **columns):\n"
            "    return [float(len(text) % 2 == 0) for text in completions]\n\n"
            "async def judge(prompts, completions, answer, **columns):\n"
            "    return [float(len(a)) for a in answer]\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        model = {
            "policy": str(arithmetic / "model"),
            "reward": [
                {"class_path": "gvpo_lightning.rewards.ExactAnswer"},
                {"class_path": "gvpo_lightning.rewards.Format", "init_args": {"pattern": "[0-9]+", "name": "number"}},
                {"class_path": "gvpo_lightning.rewards.Format", "init_args": {"pattern": ".*", "name": "anything"}},
                "own_rewards.evenness",
                "own_rewards.judge",
            ],
            "reward_settings": {"weights": [1.0, 0.25, 0.5, 0.125, 2.0], "num_workers": 2, "timeout": 20.0},
            "rollout": {"group_size": 2, "prompts_per_rollout": 2, "prompts_per_update": 2},
            "generation": {"max_new_tokens": 4},
        }
        trainer = {"max_steps": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run"), "logger": False}
        trainer |= {"enable_progress_bar": False, "limit_predict_batches": 1}
        config = {"trainer": trainer, "model": model, "data": {"path": str(arithmetic / "sums"), "batch_size": 4}}
        config["data"]["validation_split"] = "validation"
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        main(["fit", "--config", str(tmp_path / "run.yaml"), "--completions_table.every_n_steps=1"])
        (tmp_path / "run.yaml").unlink()  # what the run has left says the same
        shown = json.loads((tmp_path / "run" / "completions.jsonl").read_text().splitlines()[0])
        assert shown["reward/number"] == float(shown["completion"].isdigit())
        main(["predict", "--config", str(tmp_path / "run" / "config.yaml")])
        rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
        assert len(rows) == 4
        for row in rows:
            for n, text in enumerate(row["completions"]):
                own = [float(text == row["answer"]), float(text.isdigit()), 1.0, float(len(text) % 2 == 0)]
                own.append(float(len(row["answer"])))
                names = ("ExactAnswer", "number", "anything", "evenness", "judge")
                assert [row[f"reward/{name}"][n] for name in names] == own
                assert row["rewards"][n] == own[0] + 0.25 * own[1] + 0.5 + 0.125 * own[3] + 2 * own[4]


def test_a_reward_that_hangs_on_one_of_two_ranks_costs_those_completions_alone(tmp_path, arithmetic):
    run_ranks(tmp_path, 2, hanging_script.train, str(arithmetic / "model"), timeout=100)
