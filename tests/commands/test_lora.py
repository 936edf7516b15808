"""Every command with an adapter from the settings."""

import json
import re

import pytest
import torch

from gvpo_lightning.cli import main
from gvpo_lightning.policy.prepare import load_policy
from tests.error_budget import assert_within, logprob_budget

pytest.importorskip("peft")
LORA = ("--model.lora.r=4", "--model.lora.target_modules=all-linear")


@pytest.fixture
def run(arithmetic, tmp_path):
    """Runs a command: `run(command, *arguments)`, with the arithmetic task where it takes data."""

    def command(name, *arguments):
        settings = {
            "trainer": {
                "accelerator": "cpu",
                "max_steps": 4,
                "default_root_dir": str(tmp_path / "run"),
                "enable_progress_bar": False,
                "enable_model_summary": False,
            },
            "model": {
                "policy": str(arithmetic / "model"),
                "reward": "gvpo_lightning.rewards.ExactAnswer",
                "rollout": {"group_size": 4, "prompts_per_rollout": 8, "prompts_per_update": 4},
                "generation": {"max_new_tokens": 4},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
            "data": {"path": str(arithmetic / "sums"), "validation_split": "validation[:8]"},
        }
        (tmp_path / "config.yaml").write_text(json.dumps(settings))
        main([name, f"--config={tmp_path / 'config.yaml'}", *arguments])

    return command


def validation_reward(capsys) -> str:
    return re.search(r"validation/reward/mean\W+([\d.]+)", capsys.readouterr().out)[1]


def test_validate_and_predict_take_a_checkpoint_as_they_take_the_merged_model(run, tmp_path, capsys):
    run("fit", *LORA)
    checkpoint = f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"
    run("export", *LORA, checkpoint, f"--output={tmp_path / 'merged'}", "--merge=true")
    capsys.readouterr()
    start, trained, merged = (), (*LORA, checkpoint), (f"--model.policy={tmp_path / 'merged'}",)
    rewards, predictions = {}, {}
    for name, arguments in (("start", start), ("trained", trained), ("merged", merged)):
        run("validate", *arguments)
        rewards[name] = validation_reward(capsys)
        run("predict", *arguments, f"--trainer.default_root_dir={tmp_path / name}")
        (file,) = (tmp_path / name).glob("*.jsonl")
        predictions[name] = file.read_text()
    assert rewards["trained"] == rewards["merged"]
    assert predictions["trained"] == predictions["merged"] != predictions["start"]


def test_debug_batch_takes_the_adapter(run, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="updates in a row"):
        run("fit", *LORA, "--model.max_log_ratio=1e-9", "--model.max_skipped_updates=0")
    (batch,) = (tmp_path / "run").rglob("*offending*")
    run("debug-batch", *LORA, f"--batch={batch}")
    assert "groups, the largest gradient first" in capsys.readouterr().out


def test_cached_log_probs_of_the_reference_are_the_policys_without_its_adapter(run, arithmetic, tmp_path):
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "completions": [str(n), str(2 * n)]} for n in range(8)]
    file = tmp_path / "recorded.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    offline = ("--model.reference=cached", "--model.sources.policy=0", f"--model.sources.file.path={file}")
    data = (f"--data.path={file}", "--data.validation_split=null", "--model.rollout.group_size=2")
    run("reference", *LORA, *offline, *data)
    cached = json.loads(file.read_text().splitlines()[1])
    policy = load_policy(str(arithmetic / "model")).eval()
    ids = torch.tensor([[*load_ids(arithmetic, "1+1="), *cached["token_ids"][0]]])
    logits = policy(ids).logits[0, 3:-1]
    expected = torch.log_softmax(logits, dim=-1).gather(-1, ids[0, 4:, None]).squeeze(-1)
    assert_within(torch.tensor(cached["reference_logprobs"][0]), expected, logprob_budget(logits))
    run("fit", *LORA, *offline, *data)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4


def load_ids(arithmetic, text):
    from gvpo_lightning.policy.prepare import load_tokenizer

    return load_tokenizer(str(arithmetic / "model"))(text)["input_ids"]


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    shown = capsys.readouterr().out
    for name in (
        "--model.loading.dtype",
        "--model.loading.quantization",
        "--model.lora",
        "--run_summary.merge_adapter",
    ):
        assert name in shown
