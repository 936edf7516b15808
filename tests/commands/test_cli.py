"""The `gvpo` command, called in process on the shipped arithmetic task."""

import inspect
import json
import math
import os
import resource
import signal
import typing

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_lightning.cli import main, prefer_integers
from gvpo_lightning.policy.prepare import load_policy


@pytest.fixture
def config(arithmetic, tmp_path):
    """A short run: `config(**settings)` writes a YAML file and returns its path."""

    def write(**overrides) -> str:
        settings = {
            "seed_everything": 0,
            "trainer": {"accelerator": "cpu", "max_steps": 4, "default_root_dir": str(tmp_path / "run")},
            "model": {
                "policy": str(arithmetic / "model"),
                "reward": "gvpo_lightning.rewards.ExactAnswer",
                "rollout": {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4},
                "generation": {"max_new_tokens": 4},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
            },
            "data": {"path": str(arithmetic / "sums"), "validation_split": "validation[:8]"},
        }
        for key, value in overrides.items():
            *parents, last = key.split("__")
            target = settings
            for parent in parents:
                target = target[parent]
            target[last] = value
        path = tmp_path / "config.yaml"
        path.write_text(json.dumps(settings))  # JSON is YAML
        return str(path)

    return write


def quiet(*arguments: str) -> list[str]:
    return [*arguments, "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def test_fit_leaves_summary_curve_checkpoint_metrics_and_export(config, tmp_path):
    meter = "gvpo_lightning.callbacks.OptimalityMeter"
    path = config(trainer__log_every_n_steps=1, trainer__val_check_interval=2, trainer__callbacks=[meter])
    main(quiet("fit", "--config", path, "--completions_table.every_n_steps=2"))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert 0.2 < summary["reward_before"] < 0.7
    assert 0.2 < summary["reward_after"] <= 1
    assert summary["predicted_optimum"] == pytest.approx(1.0, abs=1e-3)
    assert 0.3 < summary["reached_optimum"] < 1
    assert summary["steps"] == 4
    seconds = summary["seconds"]
    assert set(seconds) == {"total", "rollout", "reward", "reference", "train"}
    assert seconds["total"] >= sum(value for key, value in seconds.items() if key != "total")
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "checkpoints" / "last.ckpt").exists()
    assert list((run / "tensorboard").glob("events*"))
    header = (run / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "reward/mean", "residual/rms", "kl/reference", "validation/reward/mean"} <= set(header)
    shown = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {2, 4}
    assert set(shown[0]) == {"step", "group", "prompt", "completion", "source", "reward"}
    assert (run / "config.yaml").exists()


def test_the_export_reproduces_the_policy_exactly(config, tmp_path):
    main(quiet("fit", "--config", config()))
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    export = run / summary["export_dir"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    checkpoint = run / "checkpoints" / "last.ckpt"
    trained = load_policy(str(export))
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    trained.load_state_dict({name.removeprefix("policy."): value for name, value in state.items()})
    ids = torch.tensor([tokenizer("17+5=")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, trained.eval()(ids).logits)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_whole_number_of_batches_is_a_number_not_a_fraction(config, tmp_path, monkeypatch):
    annotations = inspect.unwrap(L.Trainer.__init__).__annotations__
    for name in ("limit_predict_batches", "overfit_batches"):
        monkeypatch.setitem(annotations, name, float | int | None)  # as typing's cache may leave it
    prefer_integers()
    assert typing.get_args(annotations["limit_predict_batches"])[0] is int
    path = config(data__batch_size=4)
    main(quiet("predict", "--config", path, "--trainer.limit_predict_batches=1"))
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 4


def test_same_command_same_weights(config, tmp_path):
    exports = []
    for name in ("a", "b"):
        main(quiet("fit", "--config", config(), f"--trainer.default_root_dir={tmp_path / name}"))
        exports.append((tmp_path / name / "export" / "model.safetensors").read_bytes())
    assert exports[0] == exports[1]


SCHEDULERS = "torch.optim.lr_scheduler"
WATCHED = {"trainer__callbacks": ["lightning.pytorch.callbacks.LearningRateMonitor"], "trainer__log_every_n_steps": 1}


def rates(folder):
    """The lr of every update."""
    header, *lines = (line.split(",") for line in (folder / "metrics.csv").read_text().splitlines())
    column = header.index("lr-AdamW")
    return [float(line[column]) for line in lines if line[column]]


def test_a_warm_up_with_a_cosine_after_it_is_configured_and_goes_on_when_resumed(config, tmp_path):
    arguments = {"max_lr": 1e-3, "total_steps": 8, "pct_start": 0.5, "cycle_momentum": False}
    schedule = {"class_path": f"{SCHEDULERS}.OneCycleLR", "init_args": arguments}
    path = config(model__lr_scheduler=schedule, **WATCHED)
    found = []
    for steps in (4, 8):
        main(quiet("fit", "--config", path, f"--trainer.max_steps={steps}", "--ckpt_path=last"))
        found += rates(tmp_path / "run")

    def between(start, end, part):
        return end + (start - end) / 2 * (1 + math.cos(math.pi * part))

    start, end = 1e-3 / 25, 1e-3 / 25 / 1e4  # its defaults: div_factor and final_div_factor
    up = [between(start, 1e-3, step / 3) for step in range(4)]
    down = [between(1e-3, end, step / 4) for step in range(1, 5)]
    assert found == pytest.approx(up + down, rel=1e-6)


def test_a_schedule_may_be_a_function_of_ones_own(config, tmp_path):
    (tmp_path / "own_schedules.py").write_text(
        "from torch.optim import Optimizer\n"
        "from torch.optim.lr_scheduler import LRScheduler\n"
        "from transformers import get_cosine_schedule_with_warmup\n\n\n"
        "def warm_up(optimizer: Optimizer) -> LRScheduler:\n"
        "    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=4)\n"
    )
    main(quiet("fit", "--config", config(model__lr_scheduler="own_schedules.warm_up", **WATCHED)))
    assert rates(tmp_path / "run") == pytest.approx([0.0, 0.5e-4, 1e-4, 0.5e-4], rel=1e-6)


def test_a_plateau_is_configured_with_its_metric(config, tmp_path, capsys):
    arguments = {"mode": "max", "factor": 0.5, "patience": 0, "threshold": 100.0, "threshold_mode": "abs"}
    own = {
        "class_path": "lightning.pytorch.cli.ReduceLROnPlateau",
        "init_args": {"monitor": "validation/reward/mean", **arguments},
    }
    main(quiet("fit", "--config", config(model__lr_scheduler=own, trainer__val_check_interval=1, **WATCHED)))
    assert rates(tmp_path / "run") == pytest.approx([1e-4, 1e-4, 0.5e-4, 0.25e-4], rel=1e-6)  # the first is the best
    capsys.readouterr()
    without = {"class_path": f"{SCHEDULERS}.ReduceLROnPlateau", "init_args": arguments}
    for scheduler, message in (
        (without, "use lightning.pytorch.cli.ReduceLROnPlateau with monitor="),
        ({"class_path": "ReduceLROnPlateau", "init_args": own["init_args"]}, "Give the full class path"),
        (own, "this fit has none: give it prompts to validate on (data.validation_split"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(quiet("fit", "--config", config(model__lr_scheduler=scheduler, data__validation_split=None)))
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gvpo: error: ")]
        assert len(error) == 1
        assert message in error[0]


def test_validate_test_and_predict(config, tmp_path, capsys):
    path = config(data__test_split="validation[:3]")
    main(quiet("validate", "--config", path))
    main(quiet("test", "--config", path))
    assert "test/reward/mean" in capsys.readouterr().out
    main(quiet("predict", "--config", path))
    rows = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    columns = {"completions", "rewards", "token_ids", "truncated", "sources"}
    assert all(set(row) == {"prompt", "answer", *columns} for row in rows)
    assert all(len(row[name]) == 4 for row in rows for name in columns)
    assert {reward for row in rows for reward in row["rewards"]} <= {0.0, 1.0}


def test_resume_from_the_command_line_goes_on_where_it_was(config, tmp_path):
    def run(name, *arguments):
        folder = f"--trainer.default_root_dir={tmp_path / name}"
        main(quiet("fit", "--config", config(), folder, *arguments))
        return (tmp_path / name / "export" / "model.safetensors").read_bytes()

    through = run("through", "--trainer.max_steps=8")
    run("first", "--trainer.max_steps=4")
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    resumed = run("second", "--trainer.max_steps=8", f"--ckpt_path={checkpoint}")
    assert resumed == through
    before = [json.loads((tmp_path / n / "summary.json").read_text())["reward_before"] for n in ("through", "second")]
    assert before[0] == before[1]


def test_resume_from_last_finds_the_runs_own_checkpoint_or_starts(config, tmp_path):
    def run(name, *arguments):
        main(quiet("fit", "--config", config(), f"--trainer.default_root_dir={tmp_path / name}", *arguments))
        return (tmp_path / name / "export" / "model.safetensors").read_bytes()

    through = run("through", "--trainer.max_steps=8")
    run("run", "--trainer.max_steps=4", "--ckpt_path=last")
    assert run("run", "--trainer.max_steps=8", "--ckpt_path=last") == through
    for path in ("summary.json", "export/model.safetensors"):  # a run that is killed when all is trained
        (tmp_path / "run" / path).unlink()
    assert run("run", "--trainer.max_steps=8", "--ckpt_path=last") == through
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 8


def test_sigterm_saves_and_ends_with_143_without_the_long_evaluation(config, tmp_path):
    path = config(model__reward="tests.commands.test_cli.terminates_at_the_second_rollout")
    with pytest.raises(SystemExit) as stopped:
        main(quiet("fit", "--config", path))
    assert stopped.value.code == 143
    run = tmp_path / "run"
    assert torch.load(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert not (run / "summary.json").exists()
    assert not (run / "export").exists()
    main(quiet("fit", "--config", config(), "--ckpt_path=last"))
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


def terminates_at_the_second_rollout(prompts, completions, calls=[], **columns):  # noqa: B006
    """In the evaluation before training and the first rollout it behaves."""
    calls.append(len(completions))
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    return [0.5 + 0.01 * len(text) for text in completions]


def test_sizes_of_a_strategy_that_are_not_the_devices_are_one_line(config, root, capsys):
    strategy = str(root / "configs" / "strategy" / "fsdp2.yaml")
    with pytest.raises(SystemExit):
        main(quiet("fit", "--config", config(), "--config", strategy, "--trainer.devices=2"))
    assert "data_parallel_size=8 times tensor_parallel_size=1 of trainer.strategy must be" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_is_one_line_by_rlimit_fsize(config, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = config(model__reward="tests.commands.test_cli.limits_files_at_the_second_rollout")
    try:
        with pytest.raises(SystemExit) as stopped:
            main(quiet("fit", "--config", path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert stopped.value.code == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gvpo: error: ")]
    assert len(error) == 1
    assert "epoch=0-step=4.ckpt could not be written: File too large" in error[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def limits_files_at_the_second_rollout(prompts, completions, calls=[], **columns):  # noqa: B006
    """Files of 1 MB are smaller than a checkpoint and larger than what else is written."""
    calls.append(len(completions))
    if len(calls) == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return [0.5 + 0.01 * len(text) for text in completions]


def test_the_command_lines_learning_rate_wins_over_the_checkpoint(config, tmp_path):
    main(quiet("fit", "--config", config(), "--trainer.max_steps=2"))
    lr = "--model.optimizer.init_args.lr=5e-5"
    main(quiet("fit", "--config", config(), "--trainer.max_steps=4", "--ckpt_path=last", lr))
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    assert state["param_groups"][0]["lr"] == pytest.approx(5e-5)
    assert state["state"][0]["step"] == 4


def test_later_commands_keep_what_fit_left(config, tmp_path):
    path, run = config(trainer__log_every_n_steps=1), tmp_path / "run"
    main(quiet("fit", "--config", path))
    metrics, summary = (run / "metrics.csv").read_text(), (run / "summary.json").read_text()
    export = (run / "export" / "model.safetensors").read_bytes()
    main(quiet("predict", "--config", path))
    main(["fit", "--config", path, "--trainer.fast_dev_run=true"])
    assert (run / "metrics.csv").read_text() == metrics
    assert (run / "summary.json").read_text() == summary
    assert (run / "export" / "model.safetensors").read_bytes() == export
    main(quiet("fit", "--config", path, "--trainer.max_steps=6", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"))
    assert (run / "metrics.1.csv").read_text() == metrics


def test_an_error_after_training_began_keeps_its_traceback(config):
    path = config(model__reward="tests.commands.test_cli.gives_text_at_the_second_rollout")
    with pytest.raises(RuntimeError, match=r"fit failed at step 2: The reward .* must return numbers") as failed:
        main(quiet("fit", "--config", path))
    assert isinstance(failed.value.__cause__, ValueError)


def gives_text_at_the_second_rollout(prompts, completions, calls=[], **columns):  # noqa: B006
    """In the evaluation before training and the first rollout it behaves."""
    calls.append(len(completions))
    return ["high"] * len(completions) if len(calls) == 4 else [0.5] * len(completions)


def test_missing_checkpoint_is_one_line(config, capsys):
    assert "nowhere.ckpt" in one_line_error(["fit", "--config", config(), "--ckpt_path=nowhere.ckpt"], capsys)


def test_the_command_line_wins_over_the_checkpoint(config, tmp_path):
    main(quiet("fit", "--config", config(), "--trainer.max_steps=2"))
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(quiet("validate", "--config", config(), "--model.rollout.group_size=2", f"--ckpt_path={checkpoint}"))
    main(quiet("predict", "--config", config(), "--model.rollout.group_size=2", f"--ckpt_path={checkpoint}"))
    first = json.loads((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()[0])
    assert len(first["completions"]) == 2


LONG = "1+" * 20
ERRORS = {
    "unknown key": (["--model.betta=3"], "betta"),
    "group size": (["--model.rollout.group_size=1"], "group_size must be at least 2, got 1"),
    "update over the rollout": (["--model.rollout.prompts_per_update=9"], "Set prompts_per_rollout=9"),
    "micro-batch": (["--model.rollout.micro_batch_size=8"], "accumulate_grad_batches=2"),
    "beta": (["--model.beta=0"], "beta must be > 0, got 0"),
    "reference": (["--model.reference=mine"], "mine"),
    "reward": (["--model.reward=no.such.function"], "no.such.function"),
    "no policy there": (["--model.policy=nowhere"], "nowhere"),
    "no data there": (["--data.path=nowhere"], "nowhere"),
    "no such split": (["--data.train_split=tain"], "tain"),
    "missing column": (["--data.prompt_column=question"], "question"),
    "empty split": (["--data.train_split=train[:0]"], "is empty"),
    "no validation data": (["--data.validation_split=null"], "validation_split"),
}


def one_line_error(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(quiet(*arguments))
    assert stopped.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gvpo: error: ")]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_mistakes_end_in_one_line_before_any_work(config, tmp_path, capsys, arguments, message):
    command = "validate" if "validation_split" in message else "fit"
    assert message in one_line_error([command, "--config", config(), *arguments], capsys)
    assert not (tmp_path / "run" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is an empty file"),
        (['{"prompt": "1+1=", "answer": "2"}', '{"prompt": '], "row 1"),
        (['{"prompt": "1+1="}'], "needs the columns ['answer']"),
        (['{"question": "1+1=", "answer": "2"}'], "prompt_column='prompt' is not a column"),
        (['{"prompt": "1+1=", "answer": "2"}', '{"prompt": "", "answer": "2"}'], "row 1 has an empty prompt"),
        (
            ['{"prompt": "1+1=", "answer": "2"}', f'{{"prompt": "{LONG}", "answer": "2"}}'],
            "Row 1: the prompt's 40 tokens",
        ),
    ],
    ids=["empty file", "malformed", "column of the reward", "column of the prompt", "empty prompt", "long prompt"],
)
def test_bad_rows_are_named(config, tmp_path, capsys, lines, message):
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    path = config(data__path=str(tmp_path / "data.jsonl"), data__validation_split=None)
    assert message in one_line_error(["fit", "--config", path], capsys)


def test_a_model_without_an_end_token_is_refused(config, tmp_path, capsys, tiny_policy, tokenizer):
    model = tiny_policy(eos_token_id=None)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    path = config(model__policy=str(tmp_path / "model"))
    assert "no end-of-sequence token" in one_line_error(["fit", "--config", path], capsys)


def test_fit_says_once_what_memory_it_will_take(config, capsys):
    main(quiet("fit", "--config", config()))
    assert capsys.readouterr().out.count("Estimated peak on one device: ") == 1
